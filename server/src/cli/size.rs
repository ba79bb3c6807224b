//! Amounts of memory as people write and read them.

use std::fmt;

/// A number of bytes. Reads `512M`, `2GiB`, `1.5G`, `800MB` or plain bytes; K, M, G and T count in powers of 1,024,
/// KB, MB, GB and TB in powers of 1,000.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Bytes(pub(crate) u64);

impl std::str::FromStr for Bytes {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("expected a size such as 512M or 2GiB, got {text:?}");
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let unit = unit.trim().to_ascii_lowercase();
        let (letter, base) = match unit.as_str() {
            "" | "b" => ("", 1024u64),
            "kb" | "mb" | "gb" | "tb" => (&unit[..1], 1000),
            _ => (unit.strip_suffix("ib").unwrap_or(&unit), 1024),
        };
        let power = ["", "k", "m", "g", "t"].iter().position(|known| *known == letter).ok_or_else(wrong)?;
        let factor = base.pow(u32::try_from(power).expect("at most 4"));
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(factor).map(Self).ok_or_else(|| format!("{text:?} is more than any machine has"));
        }
        let bytes = number.parse::<f64>().map_err(|_| wrong())? * factor as f64;
        if bytes < u64::MAX as f64 { Ok(Self(bytes as u64)) } else { Err(wrong()) }
    }
}

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = ["B", "KiB", "MiB", "GiB", "TiB"];
        let mut value = self.0 as f64;
        let mut unit = 0;
        // 1,023.96 would show as "1024.0": change the unit before rounding can do that.
        while value >= 1023.95 && unit + 1 < units.len() {
            value /= 1024.0;
            unit += 1;
        }
        let text = if unit == 0 { format!("{} B", self.0) } else { format!("{value:.1} {}", units[unit]) };
        f.pad(&text)
    }
}

/// A count with its thousands as letters: `134.5M`.
pub(crate) fn count(number: u64) -> String {
    let value = number as f64;
    match number {
        0..1_000 => number.to_string(),
        1_000..1_000_000 => format!("{:.1}K", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1}M", value / 1e6),
        _ => format!("{:.1}B", value / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read() {
        for (text, bytes) in [
            ("0", 0),
            ("1234", 1234),
            ("12B", 12),
            ("1k", 1024),
            ("512M", 512 << 20),
            ("512 MiB", 512 << 20),
            ("2GiB", 2 << 30),
            ("2gib", 2 << 30),
            ("1.5G", 3 << 29),
            ("800MB", 800_000_000),
            ("1T", 1 << 40),
        ] {
            assert_eq!(text.parse(), Ok(Bytes(bytes)), "{text}");
        }
        for text in ["", "M", "-1", "1X", "1.2.3M", "12 parsecs", "99999999999T", "nan", "iB"] {
            assert!(text.parse::<Bytes>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn sizes_are_written() {
        assert_eq!(Bytes(0).to_string(), "0 B");
        assert_eq!(Bytes(1023).to_string(), "1023 B");
        assert_eq!(Bytes(98_362_432).to_string(), "93.8 MiB");
        assert_eq!(Bytes((1 << 30) - 1).to_string(), "1.0 GiB");
        assert_eq!(format!("{:>10}|", Bytes(2048)), "   2.0 KiB|");
        assert_eq!(count(134_515_008), "134.5M");
        assert_eq!(count(7), "7");
    }
}
