//! Choosing the vector instructions at run time, so that one portable binary uses what the processor has.

use pulp::{Arch, WithSimd};

use crate::device::float_mode::flush_subnormals;

/// Runs a closure compiled for the processor's vector instructions. Everything inside must be `#[inline(always)]`
/// or inlined anyway, else it is compiled for the baseline. Subnormal numbers count as zero in it, and it must not run
/// parallel work.
#[inline]
pub(crate) fn vectorised<R>(body: impl FnOnce() -> R) -> R {
    struct Body<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Body<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    flush_subnormals(|| Arch::new().dispatch(Body(body)))
}

/// Runs a kernel whose explicit vectors run over channels, as [`vectorised`] runs a closure. The widest vectors are used
/// only where channels fill them.
#[inline]
pub(super) fn with_simd<K: WithSimd>(channels: usize, kernel: K) -> K::Output {
    #[cfg(target_arch = "x86_64")]
    if !channels.is_multiple_of(16)
        && let Some(simd) = pulp::x86::V3::try_new()
    {
        return flush_subnormals(|| pulp::Simd::vectorize(simd, kernel));
    }
    let _ = channels;
    flush_subnormals(|| Arch::new().dispatch(kernel))
}
