//! Page-locked host memory: a device copies from and to it while the host goes on.
//!
//! ```text
//!   host    words_mut ── fill ── upload ────────────── words_mut ...        waits until the copy is done
//!   stream              ........ copy ──> event
//! ```
//!
//! An event behind the last copy says when the host may have the memory again; every access waits for it.

use std::ptr::NonNull;
use std::slice;
use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, result};

use super::driver::{Device, DeviceBytes, failed};
use crate::{Error, Result};

/// Page-locked memory of 32-bit words.
pub(super) struct Pinned {
    start: NonNull<u32>,
    len: usize,
    /// Recorded behind the last copy.
    copied: CudaEvent,
    context: Arc<CudaContext>,
}

// SAFETY: the memory belongs to this value alone and page-locked memory may be used by any thread.
unsafe impl Send for Pinned {}

impl Pinned {
    /// Allocates `len` words, zeros.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the system cannot lock so much.
    pub(super) fn new(device: &Device, len: usize, what: &'static str) -> Result<Self> {
        let len = len.max(1);
        let bytes = len * size_of::<u32>();
        let copied = device.context.new_event(None).map_err(|error| failed("making an event", error))?;
        device.context.bind_to_thread().map_err(|error| failed(what, error))?;
        // SAFETY: no pointer goes in, and what comes out is written below before anything reads it.
        let start = unsafe { result::malloc_host(bytes, 0) }.ok().and_then(|start| NonNull::new(start.cast::<u32>()));
        let start = start.ok_or(Error::OutOfMemory { bytes, what })?;
        // SAFETY: these are the `len` words allocated above, page-aligned, and nobody else knows of them.
        unsafe { start.as_ptr().write_bytes(0, len) };
        Ok(Self { start, len, copied, context: Arc::clone(&device.context) })
    }

    /// Number of words.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// The words, once the device is done with them.
    ///
    /// # Errors
    /// [`Error::Device`] when work submitted before the last copy, or the copy, failed.
    pub(super) fn words_mut(&mut self) -> Result<&mut [u32]> {
        self.copied.synchronize().map_err(|error| failed("waiting for a copy", error))?;
        // SAFETY: `start` has `len` initialised words that this value owns and is borrowed for, and the event behind the
        // last copy has passed, so that the device does not touch them.
        Ok(unsafe { slice::from_raw_parts_mut(self.start.as_ptr(), self.len) })
    }

    /// Submits a copy of the first `words` words to the start of `to`.
    ///
    /// # Errors
    /// [`Error::Shape`] when they do not fit, [`Error::Device`].
    pub(super) fn upload(&mut self, device: &Device, words: usize, to: &mut DeviceBytes) -> Result<()> {
        if words > self.len || words * size_of::<u32>() > to.len() {
            let expected = format!("at most {} words", self.len.min(to.len() / size_of::<u32>()));
            return Err(Error::Shape { op: "upload", expected, got: words.to_string() });
        }
        let mut view = to.slice.slice_mut(..words * size_of::<u32>());
        // SAFETY: `start` has at least `words` initialised words, as checked above. The slice ends with this statement; the
        // device reads the memory after it, and `words_mut` and `drop` wait for that.
        let bytes = unsafe { slice::from_raw_parts(self.start.as_ptr().cast::<u8>(), words * size_of::<u32>()) };
        device.stream.memcpy_htod(bytes, &mut view).map_err(|error| failed("copying to the device", error))?;
        self.copied.record(&device.stream).map_err(|error| failed("marking a copy", error))
    }

    /// Submits a copy of `words` words of `from`, from its word `first` on, to the words of the same place.
    ///
    /// # Errors
    /// As [`Pinned::upload`].
    pub(super) fn download(&mut self, device: &Device, from: &DeviceBytes, first: usize, words: usize) -> Result<()> {
        if first + words > self.len.min(from.len() / size_of::<u32>()) {
            let expected = format!("words within 0..{}", self.len.min(from.len() / size_of::<u32>()));
            return Err(Error::Shape { op: "download", expected, got: format!("{first}..{}", first + words) });
        }
        let bytes = first * size_of::<u32>()..(first + words) * size_of::<u32>();
        let view = from.slice.slice(bytes.clone());
        // SAFETY: `start` has `first + words` words, as checked above.
        let to = unsafe { self.start.as_ptr().cast::<u8>().add(bytes.start) };
        // SAFETY: `words` words that this value owns lie there; the slice ends with this statement, and what the device
        // writes later is read through `words_mut` alone, which waits for it.
        let to = unsafe { slice::from_raw_parts_mut(to, bytes.len()) };
        device.stream.memcpy_dtoh(&view, to).map_err(|error| failed("copying from the device", error))?;
        self.copied.record(&device.stream).map_err(|error| failed("marking a copy", error))
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // After an error of the device nothing runs there any more, so that the memory can go in any case.
        let _ = self.copied.synchronize();
        let _ = self.context.bind_to_thread();
        // SAFETY: it was allocated so, is freed once, and the last copy of it is done.
        let _ = unsafe { result::free_host(self.start.as_ptr().cast()) };
    }
}

#[cfg(test)]
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod tests {
    use super::*;

    fn device() -> Device {
        let info = crate::cuda::testing::device().expect("tests need a GPU, or g++ for the emulated driver");
        Device::open(info).unwrap()
    }

    #[test]
    fn the_host_gets_the_memory_back_when_the_copy_is_done() {
        let mut device = device();
        let mut there = device.alloc(4 * 8, "test").unwrap();
        let mut staging = Pinned::new(&device, 8, "test").unwrap();
        let mut back = Pinned::new(&device, 8, "test").unwrap();
        for round in 0..5 {
            staging.words_mut().unwrap().iter_mut().zip(0..).for_each(|(word, i)| *word = round * 10 + i);
            staging.upload(&device, 8, &mut there).unwrap();
            back.download(&device, &there, 2, 3).unwrap();
            // The staging memory changes at once: the copies must have read it before.
            staging.words_mut().unwrap().fill(99);
            assert_eq!(back.words_mut().unwrap()[2..5], [2, 3, 4].map(|i| round * 10 + i));
        }
        assert_eq!(back.words_mut().unwrap()[..2], [0; 2]);
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let mut device = device();
        let mut there = device.alloc(4 * 4, "test").unwrap();
        let mut memory = Pinned::new(&device, 8, "test").unwrap();
        assert!(memory.upload(&device, 5, &mut there).unwrap_err().to_string().contains("at most 4 words"));
        assert!(memory.download(&device, &there, 2, 3).unwrap_err().to_string().contains("within 0..4"));
    }
}
