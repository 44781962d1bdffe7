//! Choosing the vector instructions at run time, so that one portable binary uses what the processor has.

use pulp::{Arch, WithSimd};

/// Runs a closure compiled for the processor's vector instructions. Everything inside must be `#[inline(always)]`
/// or inlined anyway, else it is compiled for the baseline.
#[inline]
pub(super) fn vectorised<R>(body: impl FnOnce() -> R) -> R {
    struct Body<F>(F);
    impl<R, F: FnOnce() -> R> pulp::NullaryFnOnce for Body<F> {
        type Output = R;
        #[inline(always)]
        fn call(self) -> R {
            (self.0)()
        }
    }
    Arch::new().dispatch(Body(body))
}

/// Runs a kernel written with explicit vectors.
#[inline]
pub(super) fn with_simd<K: WithSimd>(kernel: K) -> K::Output {
    Arch::new().dispatch(kernel)
}
