//! How a thread treats subnormal numbers, those closer to zero than the smallest normal one (2⁻¹²⁶ in f32).
//!
//! Processors compute with them in microcode, over a hundred cycles each, and networks make them by the million where a
//! channel has died. So kernels count them as zero, as operands and as results. A GPU's do so by the compiler's option
//! `--ftz=true`; on the host it is a mode of the thread: FTZ and DAZ in MXCSR on x86-64, FZ in FPCR on aarch64.
//!
//! Only kernels run in this mode. Folding and verification compute in f64 from f32 weights, and in this mode the
//! conversion itself would drop subnormal ones. So the mode is entered around the innermost code, which runs no parallel
//! work (a thread that waits for some takes up any other task meanwhile), and left behind it, even by a panic: whatever
//! thread calls, one of the program's or one of another's, finds its own mode again.

use std::hint::black_box;

/// Runs `body`, which must not run parallel work, with subnormal numbers taken as zero.
#[inline]
pub(crate) fn flush_subnormals<R>(body: impl FnOnce() -> R) -> R {
    let _mode = FlushMode::enter();
    // The compiler may move arithmetic whose operands and results are in registers across a change of the mode, and does. What
    // goes in and what comes out therefore passes through memory, which it keeps on its side of the change.
    let body = black_box(body);
    black_box(body())
}

/// The mode of the thread while it lives.
struct FlushMode {
    before: control::Word,
}

impl FlushMode {
    #[inline]
    fn enter() -> Self {
        let before = control::read();
        let mode = Self { before };
        if !mode.was_on() {
            control::write(before | control::FLUSH);
        }
        mode
    }

    #[inline]
    fn was_on(&self) -> bool {
        self.before & control::FLUSH == control::FLUSH
    }
}

impl Drop for FlushMode {
    #[inline]
    fn drop(&mut self) {
        if !self.was_on() {
            control::write(self.before);
        }
    }
}

/// The thread's control word of floating-point arithmetic.
#[cfg(target_arch = "x86_64")]
mod control {
    use std::arch::asm;

    pub type Word = u32;
    /// FTZ for results and DAZ for operands.
    pub const FLUSH: Word = 1 << 15 | 1 << 6;

    #[inline]
    pub fn read() -> Word {
        let mut word: Word = 0;
        // SAFETY: stores MXCSR, which every x86-64 processor has, to a variable of its size.
        unsafe { asm!("stmxcsr [{}]", in(reg) &raw mut word, options(nostack, preserves_flags)) };
        word
    }

    #[inline]
    pub fn write(word: Word) {
        // SAFETY: the word is one that was read, but for FTZ and DAZ, so that no exception is unmasked and rounding stays
        // as it is. The compiler takes results for those of IEEE arithmetic, which differ by less than 2⁻¹²⁶; no bound and no
        // pointer comes of them. As the code may touch memory, no load or store moves across it.
        unsafe { asm!("ldmxcsr [{}]", in(reg) &raw const word, options(nostack)) };
    }
}

/// As above.
#[cfg(target_arch = "aarch64")]
mod control {
    use std::arch::asm;

    pub type Word = u64;
    /// FZ, for operands and results in f32 and f64.
    pub const FLUSH: Word = 1 << 24;

    #[inline]
    pub fn read() -> Word {
        let word: Word;
        // SAFETY: copies FPCR, which every aarch64 processor lets programs read.
        unsafe { asm!("mrs {}, fpcr", out(reg) word, options(nostack, preserves_flags)) };
        word
    }

    #[inline]
    pub fn write(word: Word) {
        // SAFETY: the word is one that was read, but for FZ; the rest is said of x86-64 above.
        unsafe { asm!("msr fpcr, {}", in(reg) word, options(nostack)) };
    }
}

/// Elsewhere numbers are computed with as they are.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod control {
    pub type Word = u32;
    pub const FLUSH: Word = 0;

    pub fn read() -> Word {
        0
    }

    pub fn write(_: Word) {}
}

#[cfg(all(test, any(target_arch = "x86_64", target_arch = "aarch64")))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    /// Half the smallest normal number, as an operand and as a result.
    fn operand_and_result() -> [f32; 2] {
        let (subnormal, smallest) = (black_box(f32::MIN_POSITIVE / 2.0), black_box(f32::MIN_POSITIVE));
        [subnormal * black_box(4.0), smallest * black_box(0.5)]
    }

    const KEPT: [f32; 2] = [f32::MIN_POSITIVE * 2.0, f32::MIN_POSITIVE / 2.0];

    #[test]
    fn subnormal_numbers_are_zero_inside_and_what_they_were_outside() {
        assert_eq!(operand_and_result(), KEPT);
        assert_eq!(flush_subnormals(operand_and_result), [0.0; 2]);
        assert_eq!(operand_and_result(), KEPT);
        // One inside the other: the inner one leaves the outer one's mode alone.
        let nested = flush_subnormals(|| (flush_subnormals(operand_and_result), operand_and_result()));
        assert_eq!(nested, ([0.0; 2], [0.0; 2]));
        assert_eq!(operand_and_result(), KEPT);
    }

    #[test]
    fn normal_numbers_keep_every_bit() {
        let sums = || [0.1f32, 1e-37, -3e38, f32::MIN_POSITIVE].map(|x| black_box(x) * black_box(1.000_000_1) + x);
        assert_eq!(flush_subnormals(sums).map(f32::to_bits), sums().map(f32::to_bits));
    }

    #[test]
    fn a_panic_gives_the_mode_back() {
        let panicked = catch_unwind(AssertUnwindSafe(|| flush_subnormals(|| panic!("planted"))));
        assert!(panicked.is_err());
        assert_eq!(operand_and_result(), KEPT);
    }

    #[test]
    fn a_thread_that_flushes_on_its_own_goes_on_doing_so() {
        let thread = std::thread::spawn(|| {
            let _own = FlushMode::enter();
            (flush_subnormals(operand_and_result), operand_and_result())
        });
        assert_eq!(thread.join().expect("nothing panics"), ([0.0; 2], [0.0; 2]));
    }
}
