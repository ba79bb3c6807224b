//! How much memory this process may still take: what the machine has free, or less under a cgroup limit.

use std::fs;
use std::path::Path;

/// Bytes that can be had without swapping; `None` where the system does not tell.
pub fn available_memory() -> Option<u64> {
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| meminfo_available(&text));
    let group = fs::read_to_string("/proc/self/cgroup").ok().and_then(|text| group_available(&text));
    match (machine, group) {
        (Some(machine), Some(group)) => Some(machine.min(group)),
        (machine, group) => machine.or(group),
    }
}

fn meminfo_available(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

/// The tightest limit of the process's group and its parents, less what the group uses.
fn group_available(cgroups: &str) -> Option<u64> {
    cgroups
        .lines()
        .filter_map(|line| {
            let mut fields = line.splitn(3, ':');
            let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
            match controllers {
                "" => tightest("/sys/fs/cgroup", path, ("memory.max", "memory.current")),
                _ if controllers.split(',').any(|name| name == "memory") => {
                    tightest("/sys/fs/cgroup/memory", path, ("memory.limit_in_bytes", "memory.usage_in_bytes"))
                }
                _ => None,
            }
        })
        .min()
}

fn tightest(root: &str, path: &str, (limit, usage): (&str, &str)) -> Option<u64> {
    let root = Path::new(root);
    let mut group = Some(root.join(path.trim_start_matches('/')));
    let mut found: Option<u64> = None;
    while let Some(folder) = group {
        let number = |name: &str| fs::read_to_string(folder.join(name)).ok()?.trim().parse::<u64>().ok();
        // "max" means no limit and is not a number.
        if let (Some(limit), Some(usage)) = (number(limit), number(usage)) {
            // Pages of cached files count as used and are given back under pressure.
            let reclaimable = fs::read_to_string(folder.join("memory.stat")).ok().and_then(|text| inactive_file(&text));
            let left = limit.saturating_sub(usage.saturating_sub(reclaimable.unwrap_or(0)));
            found = Some(found.map_or(left, |tightest| tightest.min(left)));
        }
        group = folder.parent().filter(|parent| parent.starts_with(root)).map(Path::to_path_buf);
    }
    found
}

fn inactive_file(stat: &str) -> Option<u64> {
    stat.lines().find_map(|line| line.strip_prefix("inactive_file "))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn meminfo_is_read_in_kibibytes() {
        let text = "MemTotal:       2048 kB\nMemAvailable:    1024 kB\nBuffers: 1 kB\n";
        assert_eq!(meminfo_available(text), Some(1 << 20));
        assert_eq!(meminfo_available("MemTotal: 1 kB"), None);
    }

    #[test]
    fn cgroup_stat_is_read() {
        assert_eq!(inactive_file("anon 5\ninactive_file 77\nactive_file 3"), Some(77));
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn this_machine_has_memory() {
        assert!(available_memory().expect("Linux tells") > 1 << 20);
    }
}
