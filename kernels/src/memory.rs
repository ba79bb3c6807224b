//! Memory of the kernels crate: aligned arenas and read-only mapped files.

use std::marker::PhantomData;
use std::ops::{Deref, DerefMut, Range};
use std::path::Path;
use std::ptr::NonNull;

use crate::{Error, Result};

/// Alignment of every arena, in bytes: one cache line, one AVX-512 vector.
pub const ALIGN: usize = 64;

/// Size and alignment of a huge page; arenas of at least this size ask the system for huge pages.
pub const HUGE_PAGE: usize = 2 << 20;

mod sealed {
    /// Types that any bytes, zero among them, are a valid value of, and that have no padding.
    pub trait Plain: Copy + Send + Sync + 'static {}
    impl Plain for u8 {}
    impl Plain for i8 {}
    impl Plain for u16 {}
    impl Plain for i16 {}
    impl Plain for u32 {}
    impl Plain for u64 {}
    impl Plain for i32 {}
    impl Plain for f32 {}
    impl<T: Plain, const N: usize> Plain for [T; N] {}
}
pub(crate) use sealed::Plain;

/// A zeroed, 64-byte aligned slice of fixed length, in huge pages when it is large.
///
/// Pages are taken from the system at first touch: an arena that is never written costs no resident memory.
pub struct Arena<T: Plain> {
    ptr: NonNull<T>,
    len: usize,
    /// What `ptr` lies in; `None` for the empty arena.
    map: Option<system::Mapping>,
    _owns: PhantomData<T>,
}

// SAFETY: an arena owns its memory alone, as a `Box<[T]>` does, and `Plain` types are `Send`.
unsafe impl<T: Plain> Send for Arena<T> {}
// SAFETY: shared access only reads, and `Plain` types are `Sync`.
unsafe impl<T: Plain> Sync for Arena<T> {}

impl<T: Plain> Arena<T> {
    /// Allocates `len` zeroes; `what` names their purpose in the error.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`] when the system refuses or the size overflows.
    pub fn zeroed(len: usize, what: &'static str) -> Result<Self> {
        const { assert!(align_of::<T>() <= ALIGN) };
        let refused = |bytes| Error::OutOfMemory { bytes, what };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| refused(usize::MAX))?;
        if bytes == 0 {
            return Ok(Self { ptr: NonNull::dangling(), len, map: None, _owns: PhantomData });
        }
        let (map, aligned) = system::map(bytes).ok_or_else(|| refused(bytes))?;
        Ok(Self { ptr: aligned.cast(), len, map: Some(map), _owns: PhantomData })
    }

    /// Size in bytes.
    pub fn bytes(&self) -> usize {
        self.len * size_of::<T>()
    }
}

impl<T: Plain> Drop for Arena<T> {
    fn drop(&mut self) {
        if let Some(map) = self.map.take() {
            system::unmap(map);
        }
    }
}

impl<T: Plain> Deref for Arena<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        // SAFETY: `zeroed` mapped `len` values at `ptr`, aligned, and zero is a valid `Plain` value.
        unsafe { std::slice::from_raw_parts(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Plain> DerefMut for Arena<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        // SAFETY: as in `deref`, and `&mut self` is the only access.
        unsafe { std::slice::from_raw_parts_mut(self.ptr.as_ptr(), self.len) }
    }
}

impl<T: Plain> std::fmt::Debug for Arena<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Arena<{}>({})", std::any::type_name::<T>(), self.len)
    }
}

#[cfg(unix)]
mod system {
    use super::{HUGE_PAGE, NonNull};

    /// A mapping of the system.
    pub(super) struct Mapping {
        start: NonNull<u8>,
        length: usize,
    }

    /// Maps at least `bytes` zeroed bytes. Returns the mapping and the first aligned byte in it.
    pub(super) fn map(bytes: usize) -> Option<(Mapping, NonNull<u8>)> {
        let huge = bytes >= HUGE_PAGE;
        // The system aligns to its page size only; a huge page more leaves room to align by hand.
        let length = if huge { bytes.checked_next_multiple_of(HUGE_PAGE)?.checked_add(HUGE_PAGE)? } else { bytes };
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: an anonymous mapping at an address of the system's choice touches no existing memory.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        if start == libc::MAP_FAILED {
            return None;
        }
        let start = NonNull::new(start.cast::<u8>())?;
        if !huge {
            return Some((Mapping { start, length }, start));
        }
        let skip = start.as_ptr().align_offset(HUGE_PAGE);
        // SAFETY: `skip < HUGE_PAGE`, and the mapping is a huge page longer than what is used.
        let aligned = unsafe { start.add(skip) };
        #[cfg(target_os = "linux")]
        // SAFETY: the range lies in the mapping made above; the advice changes speed, not content. A refusal is harmless.
        unsafe {
            libc::madvise(aligned.as_ptr().cast(), length - HUGE_PAGE, libc::MADV_HUGEPAGE)
        };
        Some((Mapping { start, length }, aligned))
    }

    /// Gives a mapping back.
    pub(super) fn unmap(map: Mapping) {
        // SAFETY: start and length are what `map` got from the system, and the owner is being dropped.
        unsafe { libc::munmap(map.start.as_ptr().cast(), map.length) };
    }
}

#[cfg(not(unix))]
mod system {
    use super::{ALIGN, NonNull};
    use std::alloc::Layout;

    /// An allocation.
    pub(super) struct Mapping {
        start: NonNull<u8>,
        layout: Layout,
    }

    /// Allocates `bytes` zeroed bytes. Returns the allocation and its first byte.
    pub(super) fn map(bytes: usize) -> Option<(Mapping, NonNull<u8>)> {
        let layout = Layout::from_size_align(bytes, ALIGN).ok()?;
        // SAFETY: the caller asks for at least one byte.
        let start = NonNull::new(unsafe { std::alloc::alloc_zeroed(layout) })?;
        Some((Mapping { start, layout }, start))
    }

    /// Gives an allocation back.
    pub(super) fn unmap(map: Mapping) {
        // SAFETY: start and layout are those of `map`, and the owner is being dropped.
        unsafe { std::alloc::dealloc(map.start.as_ptr(), map.layout) };
    }
}

/// A slice that worker threads write at the same time, each in its own part.
///
/// The borrow checker cannot see that the parts are disjoint, so taking one is unsafe; the lifetime keeps the arena
/// borrowed meanwhile.
#[derive(Clone, Copy)]
pub(crate) struct SharedMut<'a, T: Plain> {
    ptr: NonNull<T>,
    len: usize,
    _borrows: PhantomData<&'a mut [T]>,
}

// SAFETY: a `SharedMut` only hands out parts under the contract of `part`, which forbids overlap between threads.
unsafe impl<T: Plain> Send for SharedMut<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Plain> Sync for SharedMut<'_, T> {}

impl<'a, T: Plain> SharedMut<'a, T> {
    /// Shares out a slice.
    pub(crate) fn new(slice: &'a mut [T]) -> Self {
        Self { len: slice.len(), ptr: NonNull::from(slice).cast(), _borrows: PhantomData }
    }

    /// The values `start..start + len`.
    ///
    /// # Safety
    /// No other part that overlaps is in use while the result is.
    ///
    /// # Panics
    /// When the range leaves the slice.
    #[inline(always)]
    pub(crate) unsafe fn part(self, start: usize, len: usize) -> &'a mut [T] {
        assert!(start <= self.len && len <= self.len - start, "part {start}+{len} of {}", self.len);
        // SAFETY: the range was just checked.
        let first = unsafe { self.ptr.add(start) };
        // SAFETY: the range lies in the borrowed slice, and the caller vouches that nothing overlaps it.
        unsafe { std::slice::from_raw_parts_mut(first.as_ptr(), len) }
    }
}

/// Views bytes, or other values, as values of `T`.
///
/// # Panics
/// When `values` are not aligned for `T` or not a whole number of them.
#[inline]
pub(crate) fn cast<T: Plain>(values: &[impl Plain]) -> &[T] {
    let bytes = size_of_val(values);
    assert!(values.as_ptr().addr().is_multiple_of(align_of::<T>()) && bytes.is_multiple_of(size_of::<T>()));
    // SAFETY: alignment and length were just checked, and every bit pattern is a valid `Plain` value.
    unsafe { std::slice::from_raw_parts(values.as_ptr().cast(), bytes / size_of::<T>()) }
}

/// As [`cast`], for writing.
///
/// # Panics
/// When `values` are not aligned for `T` or not a whole number of them.
#[inline]
pub(crate) fn cast_mut<T: Plain>(values: &mut [impl Plain]) -> &mut [T] {
    let bytes = size_of_val(values);
    assert!(values.as_ptr().addr().is_multiple_of(align_of::<T>()) && bytes.is_multiple_of(size_of::<T>()));
    // SAFETY: alignment and length were just checked; `Plain` values have no padding and any bit pattern is valid.
    unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), bytes / size_of::<T>()) }
}

/// A read-only file in memory.
#[derive(Debug)]
pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps a file.
    ///
    /// The file must not be cut short while it is mapped: reading the lost part ends the process. Nothing here can
    /// prevent that, for any mapped file.
    ///
    /// # Errors
    /// [`Error::Map`] with the system's reason.
    pub fn open(path: &Path) -> Result<Self> {
        let failed = |source| Error::Map { path: path.to_owned(), source };
        let file = std::fs::File::open(path).map_err(failed)?;
        // SAFETY: the mapping is private and read-only; see the note on truncation above.
        let map = unsafe { memmap2::Mmap::map(&file) }.map_err(failed)?;
        Ok(Self { map })
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Gives the whole pages inside `range` (in bytes) back to the system, after their content was packed elsewhere.
    /// Reading them again is correct, and reads the file again.
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            // SAFETY: `sysconf` only reads a constant of the system.
            let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096).max(1);
            let start = range.start.next_multiple_of(page);
            let end = range.end.min(self.map.len()) / page * page;
            if start < end {
                // SAFETY: the pages are a private, never written view of a file: dropped ones are read from it again.
                // A refusal costs memory, not correctness.
                let _ =
                    unsafe { self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start) };
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arenas_are_aligned_and_zero() {
        for len in [0, 1, 63, 4096, HUGE_PAGE / 4, HUGE_PAGE] {
            let mut arena = Arena::<f32>::zeroed(len, "test").unwrap();
            assert_eq!(arena.len(), len);
            assert_eq!(arena.as_ptr().addr() % if len * 4 >= HUGE_PAGE { HUGE_PAGE } else { align_of::<f32>() }, 0);
            assert!(arena.iter().all(|&x| x == 0.0));
            arena.fill(1.0);
            assert_eq!(arena.iter().map(|&x| f64::from(x)).sum::<f64>(), len as f64);
        }
    }

    #[test]
    fn an_absurd_size_is_refused() {
        assert!(matches!(Arena::<f32>::zeroed(usize::MAX / 2, "test"), Err(Error::OutOfMemory { what: "test", .. })));
        assert!(matches!(Arena::<u8>::zeroed(usize::MAX - 5, "test"), Err(Error::OutOfMemory { .. })));
    }

    #[test]
    fn a_released_range_reads_the_same() {
        let path = std::env::temp_dir().join(format!("cupola-mapped-{}", std::process::id()));
        let content: Vec<u8> = (0..40_000u32).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &content).unwrap();
        let file = MappedFile::open(&path).unwrap();
        assert_eq!(file.bytes(), content);
        file.release(10..39_000);
        file.release(39_000..90_000);
        file.release(5..6);
        assert_eq!(file.bytes(), content);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = MappedFile::open(Path::new("/nowhere/weights.gguf")).unwrap_err();
        assert!(error.to_string().contains("/nowhere/weights.gguf"), "{error}");
    }
}
