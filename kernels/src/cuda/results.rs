//! What passes have chosen: tokens of an argmax or of draws, on the device, on their way to the host, and as token ids of the
//! next pass.
//!
//! ```text
//!   pass N       argmax | draw ──> there[turn] ──copy──> here[turn] ──event──> host
//!                                     │
//!   pass N + 1                        └── carry_tokens ──> token ids of its rows
//! ```
//!
//! There are two places, which passes take in turns: what pass N has chosen is read by the host, and by pass N + 1, while pass
//! N + 1 fills the other one. Each has an event of its own behind its last copy, so that the host waits for pass N alone.

use super::driver::{Arg, Device, DeviceBytes, Launch};
use super::pinned::Pinned;
use super::scratch::argmax_bytes;
use crate::{Error, Pass, Result, Turn};

const WHAT: &str = "the tokens that a pass has chosen";
/// Threads of a block of `carry_tokens`.
const THREADS: usize = 128;

/// The results of the last two passes.
#[derive(Default)]
pub(super) struct Results {
    /// Best value and feature of each panel of an argmax.
    panels: Option<[DeviceBytes; 2]>,
    places: [Option<Place>; 2],
    /// Of the pass under way.
    turn: Turn,
}

/// Results of one pass, a word a row: a token, or why there is none.
pub(super) struct Place {
    pub(super) there: DeviceBytes,
    here: Pinned,
    /// How many there are.
    count: usize,
    /// What tokens are below.
    vocab: usize,
}

/// Where the next pass finds its token ids.
#[derive(Clone, Copy, Debug)]
pub(super) struct Source {
    from: Arg,
    /// What tokens are below.
    pub(super) vocab: usize,
}

impl Results {
    /// Makes room for passes of up to `results` results, by an argmax of `rows` rows of `panels` panels at a time.
    ///
    /// # Errors
    /// Those of [`Device::alloc`].
    pub(super) fn reserve(&mut self, device: &mut Device, sizes: (usize, usize), results: usize) -> Result<()> {
        // Loading it later could make the host wait for the device.
        device.kernel("tokens", "carry_tokens")?;
        for turn in [Turn::B, Turn::A] {
            self.turn = turn;
            self.place(device, results)?;
        }
        self.argmax(device, sizes, results).map(drop)
    }

    /// The results of this turn are those of a new pass from now on.
    pub(super) fn begin(&mut self, turn: Turn) {
        self.turn = turn;
        if let Some(place) = &mut self.places[turn.index()] {
            place.count = 0;
        }
    }

    /// Room for the panels of an argmax of `rows` rows of `panels` panels, and for results up to `results`.
    ///
    /// # Errors
    /// Those of [`Device::alloc`].
    pub(super) fn argmax(
        &mut self,
        device: &mut Device,
        (rows, panels): (usize, usize),
        results: usize,
    ) -> Result<(&[DeviceBytes; 2], &mut Place)> {
        const WHAT: &str = "the best of each panel";
        let bytes = argmax_bytes(rows, panels);
        if self.panels.as_ref().is_none_or(|panels| panels[0].len() < bytes) {
            self.panels = None;
            self.panels = Some([device.alloc(bytes, WHAT)?, device.alloc(bytes, WHAT)?]);
        }
        self.place(device, results)?;
        let place = self.places[self.turn.index()].as_mut().expect("`place` made it");
        Ok((self.panels.as_ref().expect("they were made above"), place))
    }

    /// Room for results of the pass under way up to `results`.
    ///
    /// # Errors
    /// Those of [`Device::alloc`].
    pub(super) fn place(&mut self, device: &mut Device, results: usize) -> Result<&mut Place> {
        let place = &mut self.places[self.turn.index()];
        if place.as_ref().is_none_or(|place| place.here.len() < results) {
            let (mut there, mut here) = (device.alloc(4 * results, WHAT)?, Pinned::new(device, results, WHAT)?);
            let (mut count, mut vocab) = (0, 0);
            // Results of earlier rounds stay.
            if let Some(old) = place {
                here.words_mut()?[..old.here.len()].copy_from_slice(old.here.words_mut()?);
                here.upload(device, old.here.len(), &mut there)?;
                (count, vocab) = (old.count, old.vocab);
            }
            *place = Some(Place { there, here, count, vocab });
        }
        Ok(place.as_mut().expect("it was made above"))
    }

    /// The first `count` results of the last pass of this turn; waits for them.
    ///
    /// # Errors
    /// [`Error::Shape`] when there are not so many, [`Error::Device`].
    pub(super) fn chosen(&mut self, turn: Turn, count: usize) -> Result<&[u32]> {
        let place = &mut self.places[turn.index()];
        let there_are = place.as_ref().map_or(0, |place| place.count);
        if count > there_are {
            let expected = format!("at most the {there_are} results there are");
            return Err(Error::Shape { op: "chosen", expected, got: count.to_string() });
        }
        let Some(place) = place else { return Ok(&[]) };
        Ok(&place.here.words_mut()?[..count])
    }

    /// Where a pass finds the token ids that it takes from the pass before; `None` when it takes none.
    ///
    /// # Errors
    /// [`Error::Shape`] for results that the pass before does not have, and for more of them than the pass has rows.
    pub(super) fn source(&self, pass: &Pass<'_>) -> Result<Option<Source>> {
        let Some(&most) = pass.carried.iter().max() else { return Ok(None) };
        let refuse = |expected: String, got: String| Err(Error::Shape { op: "begin_pass", expected, got });
        if pass.carried.len() > pass.tokens.len() {
            return refuse(format!("at most {} carried tokens", pass.tokens.len()), pass.carried.len().to_string());
        }
        let place = self.places[pass.turn.other().index()].as_ref();
        match place.filter(|place| (most as usize) < place.count) {
            Some(place) => Ok(Some(Source { from: place.there.at(0), vocab: place.vocab })),
            None => {
                let count = place.map_or(0, |place| place.count);
                refuse(format!("one of the {count} results of the pass before"), format!("result {most}"))
            }
        }
    }
}

impl Place {
    /// Submits the copy of results that were just written; tokens are below `vocab`.
    ///
    /// # Errors
    /// [`Error::Device`].
    pub(super) fn copy_back(&mut self, device: &Device, first: usize, rows: usize, vocab: usize) -> Result<()> {
        (self.count, self.vocab) = (first + rows, vocab);
        self.here.download(device, &self.there, first, rows)
    }
}

impl Source {
    /// Replaces `count` numbers of results by what they are.
    ///
    /// # Errors
    /// Those of [`Device::launch`].
    pub(super) fn carry(&self, device: &mut Device, tokens: Arg, count: usize) -> Result<()> {
        let kernel = device.kernel("tokens", "carry_tokens")?;
        let grid = (count.div_ceil(THREADS) as u32, 1);
        let args = [tokens, self.from, Arg::U32(count as u32), Arg::U32(self.vocab as u32)];
        device.launch(&kernel, Launch { grid, block: THREADS as u32, shared: 0 }, &args)
    }
}
