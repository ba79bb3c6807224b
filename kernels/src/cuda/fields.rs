//! A struct that a kernel takes by value, put together field by field as a C compiler lays it out.

use super::driver::Arg;

/// Fields so far, each aligned to its own size. The struct's size is a multiple of 8: every struct of ours has a pointer.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct Fields {
    words: [u64; Fields::WORDS],
    /// Bytes in use.
    len: usize,
}

// SAFETY: a kernel reads at most the `Fields::bytes` first bytes (the launch compares that with the kernel's own parameter
// size), which are initialised plain words.
unsafe impl cudarc::driver::DeviceRepr for Fields {}

impl Fields {
    /// The most 8-byte words of a struct.
    const WORDS: usize = 16;

    /// Adds a pointer.
    pub(crate) fn pointer(mut self, at: Arg) -> Self {
        let Arg::Pointer(address) = at else { unreachable!("only addresses are given as pointers") };
        self.len = self.len.next_multiple_of(8);
        self.words[self.len / 8] = address;
        self.len += 8;
        self
    }

    /// Adds an `unsigned`.
    pub(crate) fn number(mut self, value: usize) -> Self {
        let value = u32::try_from(value).expect("sizes are checked against arenas of less than 2^32 elements");
        self.words[self.len / 8] |= u64::from(value) << (8 * (self.len % 8));
        self.len += 4;
        self
    }

    /// Adds a `float`.
    pub(crate) fn float(self, value: f32) -> Self {
        self.number(value.to_bits() as usize)
    }

    /// Adds the fields of a struct within this one; that too is a multiple of 8.
    pub(crate) fn inner(mut self, fields: Fields) -> Self {
        self.len = self.len.next_multiple_of(8);
        let (at, count) = (self.len / 8, fields.bytes() / 8);
        self.words[at..at + count].copy_from_slice(&fields.words[..count]);
        self.len += fields.bytes();
        self
    }

    /// Size of the struct.
    pub(crate) fn bytes(&self) -> usize {
        self.len.next_multiple_of(8)
    }
}

/// No memory.
pub(crate) const NULL: Arg = Arg::Pointer(0);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_lie_where_c_puts_them() {
        let inner = Fields::default().pointer(Arg::Pointer(7)).number(3);
        let all = Fields::default().number(1).inner(inner).float(1.0).number(2).number(5).pointer(NULL);
        assert_eq!(inner.bytes(), 16);
        assert_eq!(all.bytes(), 48);
        assert_eq!(all.words[..6], [1, 7, 3, 0x3f80_0000 | 2 << 32, 5, 0]);
    }
}
