//! UTC dates for file names and records, without a calendar library.

use std::time::{SystemTime, UNIX_EPOCH};

/// Year, month, day, hour, minute, second.
pub(crate) struct Utc {
    date: (i64, u32, u32),
    time: (u64, u64, u64),
}

impl Utc {
    /// The moment `at`; moments before 1970 count as 1970.
    pub(crate) fn new(at: SystemTime) -> Self {
        let seconds = at.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (days, rest) = (seconds / 86_400, seconds % 86_400);
        Self {
            date: civil(i64::try_from(days).expect("fewer days than 2^63")),
            time: (rest / 3600, rest / 60 % 60, rest % 60),
        }
    }

    /// `20260102-030405`.
    pub(crate) fn compact(&self) -> String {
        let ((year, month, day), (hour, minute, second)) = (self.date, self.time);
        format!("{year:04}{month:02}{day:02}-{hour:02}{minute:02}{second:02}")
    }

    /// `2026-01-02T03:04:05Z`.
    pub(crate) fn iso(&self) -> String {
        let ((year, month, day), (hour, minute, second)) = (self.date, self.time);
        format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
    }
}

/// Days after 1970-01-01 to a date of the Gregorian calendar. Years are counted from March, so that the leap day is the
/// last day of a year; 400 of them are always 146,097 days.
fn civil(days: i64) -> (i64, u32, u32) {
    let from_march_0000 = days + 719_468;
    let (era, day_of_era) = (from_march_0000.div_euclid(146_097), from_march_0000.rem_euclid(146_097));
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + i64::from(month <= 2);
    (year, u32::try_from(month).expect("1 to 12"), u32::try_from(day).expect("1 to 31"))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn known_moments() {
        let at = |seconds| Utc::new(UNIX_EPOCH + Duration::from_secs(seconds)).iso();
        assert_eq!(at(0), "1970-01-01T00:00:00Z");
        assert_eq!(at(951_782_399), "2000-02-28T23:59:59Z");
        assert_eq!(at(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(at(1_767_225_599), "2025-12-31T23:59:59Z");
        assert_eq!(at(4_107_542_400), "2100-03-01T00:00:00Z");
        assert_eq!(Utc::new(UNIX_EPOCH + Duration::from_secs(1_767_323_045)).compact(), "20260102-030405");
    }
}
