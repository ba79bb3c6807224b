//! What the HTTP side counts about itself; `api::metrics` gives the numbers their names.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Upper bounds of request durations, in seconds.
pub(crate) const DURATION_BOUNDS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0];

/// Requests of one route, method and status.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Series {
    /// The route's pattern, or `unmatched`.
    pub(crate) handler: String,
    pub(crate) method: &'static str,
    /// 499 when the client left before the answer began.
    pub(crate) status: u16,
}

/// Durations of one route's requests.
#[derive(Clone, Debug, Default)]
pub(crate) struct Durations {
    /// Requests up to each bound, not cumulative; the last counts what is above all of them.
    pub(crate) counts: [u64; DURATION_BOUNDS.len() + 1],
    /// Seconds.
    pub(crate) sum: f64,
}

#[derive(Debug, Default)]
struct Tables {
    requests: BTreeMap<Series, u64>,
    durations: BTreeMap<String, Durations>,
    rejected: BTreeMap<&'static str, u64>,
}

/// The counters. Touched once or twice a request, so a lock around the tables costs nothing that shows.
#[derive(Debug, Default)]
pub struct Meter {
    tables: Mutex<Tables>,
    in_flight: AtomicU64,
    connections: AtomicU64,
    client_gone: AtomicU64,
}

impl Meter {
    fn tables(&self) -> MutexGuard<'_, Tables> {
        // Counters stay valid whatever happened to another thread.
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn begin(&self) {
        self.in_flight.fetch_add(1, Relaxed);
    }

    /// Counts a request that is over; `complete` is false when the client left before the end.
    pub(crate) fn end(&self, series: Series, took: Duration, complete: bool) {
        self.in_flight.fetch_sub(1, Relaxed);
        if !complete {
            self.client_gone.fetch_add(1, Relaxed);
        }
        let seconds = took.as_secs_f64();
        let bucket = DURATION_BOUNDS.partition_point(|bound| *bound < seconds);
        let mut tables = self.tables();
        let durations = tables.durations.entry(series.handler.clone()).or_default();
        durations.counts[bucket] += 1;
        durations.sum += seconds;
        *tables.requests.entry(series).or_default() += 1;
    }

    pub(crate) fn reject(&self, reason: &'static str) {
        *self.tables().rejected.entry(reason).or_default() += 1;
    }

    pub(crate) fn connection_opened(&self) {
        self.connections.fetch_add(1, Relaxed);
    }

    pub(crate) fn connection_closed(&self) {
        self.connections.fetch_sub(1, Relaxed);
    }

    /// Requests being answered, streams included.
    pub fn in_flight(&self) -> u64 {
        self.in_flight.load(Relaxed)
    }

    /// Open connections.
    pub fn connections(&self) -> u64 {
        self.connections.load(Relaxed)
    }

    /// Requests whose client left before the end of the answer.
    pub fn client_gone(&self) -> u64 {
        self.client_gone.load(Relaxed)
    }

    pub(crate) fn requests(&self) -> BTreeMap<Series, u64> {
        self.tables().requests.clone()
    }

    pub(crate) fn durations(&self) -> BTreeMap<String, Durations> {
        self.tables().durations.clone()
    }

    pub(crate) fn rejected(&self) -> BTreeMap<&'static str, u64> {
        self.tables().rejected.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_counted_once_in_each_table() {
        let meter = Meter::default();
        let series = Series { handler: "/x".to_owned(), method: "GET", status: 200 };
        meter.begin();
        assert_eq!(meter.in_flight(), 1);
        meter.end(series.clone(), Duration::from_millis(5), false);
        assert_eq!((meter.in_flight(), meter.client_gone()), (0, 1));
        assert_eq!(meter.requests()[&series], 1);
        let durations = &meter.durations()["/x"];
        assert_eq!(durations.counts.iter().sum::<u64>(), 1);
        assert_eq!(durations.counts[2], 1, "5 ms lies in the bucket up to 0.005 s");
    }
}
