//! Starting, serving, draining, stopping: one value that every part of the server can watch.
//!
//! ```text
//!   Serving --first signal--> Draining --all requests done, or --shutdown-timeout--> Stopping
//!             /ready 503, new work 503,                        answers still running end
//!             running answers go on                            with an error; connections close
//! ```
//!
//! The phase only moves forward. A second signal ends the process at once.

use tokio::sync::watch;

/// Where the server is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Taking requests.
    Serving,
    /// Finishing what runs, taking nothing new.
    Draining,
    /// Ending what still runs.
    Stopping,
}

/// The server's phase, shared. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Lifecycle {
    phase: watch::Sender<Phase>,
}

impl Default for Lifecycle {
    fn default() -> Self {
        Self { phase: watch::Sender::new(Phase::Serving) }
    }
}

impl Lifecycle {
    /// The phase now.
    pub fn phase(&self) -> Phase {
        *self.phase.borrow()
    }

    /// Moves on to `next`; never moves back.
    pub fn advance(&self, next: Phase) {
        self.phase.send_if_modified(|phase| {
            let later = next > *phase;
            if later {
                *phase = next;
            }
            later
        });
    }

    /// Waits until the phase is `least` or later.
    pub async fn reached(&self, least: Phase) {
        let mut watching = self.phase.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        let _ = watching.wait_for(|phase| *phase >= least).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_phase_only_moves_forward() {
        let life = Lifecycle::default();
        let seen = tokio::spawn({
            let life = life.clone();
            async move { life.reached(Phase::Draining).await }
        });
        life.advance(Phase::Stopping);
        life.advance(Phase::Draining);
        assert_eq!(life.phase(), Phase::Stopping);
        seen.await.expect("a later phase counts too");
    }
}
