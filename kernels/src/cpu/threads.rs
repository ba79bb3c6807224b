//! How many worker threads this process may keep busy.
//!
//! ```text
//!   CPUs in the affinity mask ──one per physical core──> cores ──min──> threads
//!   cgroup CPU quota (v2 cpu.max, v1 cfs_quota) ──rounded up─────^
//! ```

use std::path::{Path, PathBuf};

/// Worker threads to use by default: one per physical core that the process may run on, at most its CPU quota.
pub fn default_threads() -> usize {
    let cores = physical_cores().unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
    let quota = quota(Path::new("/proc/self/cgroup"), Path::new("/sys/fs/cgroup")).unwrap_or(usize::MAX);
    cores.min(quota).max(1)
}

/// Physical cores among the CPUs of the affinity mask: two hardware threads of a core share its multipliers.
#[cfg(target_os = "linux")]
fn physical_cores() -> Option<usize> {
    // SAFETY: zero is the empty CPU set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    // SAFETY: the set is as large as the size given with it.
    if unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &raw mut set) } != 0 {
        return None;
    }
    let mut cores = std::collections::HashSet::new();
    for cpu in 0..usize::try_from(libc::CPU_SETSIZE).ok()? {
        // SAFETY: `cpu` is below CPU_SETSIZE.
        if unsafe { libc::CPU_ISSET(cpu, &set) } {
            // The list of siblings names the core. Without it, each CPU counts as a core.
            let siblings = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
            cores.insert(std::fs::read_to_string(siblings).unwrap_or_else(|_| cpu.to_string()));
        }
    }
    (!cores.is_empty()).then_some(cores.len())
}

#[cfg(not(target_os = "linux"))]
fn physical_cores() -> Option<usize> {
    None
}

/// CPUs that the process's control group may use, rounded up; `None` without a limit.
fn quota(membership: &Path, root: &Path) -> Option<usize> {
    let membership = std::fs::read_to_string(membership).ok()?;
    membership.lines().filter_map(|line| quota_of_line(line, root)).min()
}

/// The limit that one line of `/proc/self/cgroup` leads to: `hierarchy:controllers:/path`.
fn quota_of_line(line: &str, root: &Path) -> Option<usize> {
    let mut fields = line.splitn(3, ':');
    let (_, controllers, path) = (fields.next()?, fields.next()?, fields.next()?);
    let (mount, read): (PathBuf, fn(&Path) -> Option<usize>) = if controllers.is_empty() {
        (root.to_owned(), quota_v2)
    } else if controllers.split(',').any(|c| c == "cpu") {
        (root.join(controllers), quota_v1)
    } else {
        return None;
    };
    // A limit on any ancestor binds too. Inside a container the path may lie outside of what is mounted; then only
    // the mount's own root is found, which is the right one.
    let group = mount.join(path.trim_start_matches('/'));
    group.ancestors().take_while(|dir| dir.starts_with(&mount)).filter_map(read).min()
}

fn quota_v2(group: &Path) -> Option<usize> {
    let text = std::fs::read_to_string(group.join("cpu.max")).ok()?;
    let (limit, period) = text.trim().split_once(' ')?;
    round_up(limit.parse().ok()?, period.parse().ok()?)
}

fn quota_v1(group: &Path) -> Option<usize> {
    let read = |file: &str| std::fs::read_to_string(group.join(file)).ok()?.trim().parse().ok();
    // An unlimited group says -1, which does not parse as an unsigned number.
    round_up(read("cpu.cfs_quota_us")?, read("cpu.cfs_period_us")?)
}

fn round_up(limit: u64, period: u64) -> Option<usize> {
    if period == 0 { None } else { usize::try_from(limit.div_ceil(period)).ok().map(|cpus| cpus.max(1)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotas_are_found_in_both_versions_and_in_ancestors() {
        let root = std::env::temp_dir().join(format!("cupola-cgroup-{}", std::process::id()));
        let make = |dir: &str, file: &str, text: &str| {
            std::fs::create_dir_all(root.join(dir)).unwrap();
            std::fs::write(root.join(dir).join(file), text).unwrap();
        };
        make("a/b", "cpu.max", "max 100000\n");
        make("a", "cpu.max", "250000 100000\n");
        make("cpu,cpuacct/x", "cpu.cfs_quota_us", "-1\n");
        make("cpu,cpuacct/x", "cpu.cfs_period_us", "100000\n");
        make("cpu,cpuacct/y", "cpu.cfs_quota_us", "50000\n");
        make("cpu,cpuacct/y", "cpu.cfs_period_us", "100000\n");
        assert_eq!(quota_of_line("0::/a/b", &root), Some(3));
        assert_eq!(quota_of_line("0::/other", &root), None);
        assert_eq!(quota_of_line("4:cpu,cpuacct:/x", &root), None);
        assert_eq!(quota_of_line("4:cpu,cpuacct:/y", &root), Some(1));
        assert_eq!(quota_of_line("5:memory:/y", &root), None);
        assert_eq!(quota_of_line("nonsense", &root), None);
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn there_is_at_least_one_thread() {
        assert!((1..=4096).contains(&default_threads()));
    }
}
