//! Choosing the vector instructions at run time, so that one portable binary uses what the processor has.

use pulp::{Arch, Simd, WithSimd};

use super::activation::Clamp;
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
        return flush_subnormals(|| Simd::vectorize(simd, kernel));
    }
    let _ = channels;
    flush_subnormals(|| Arch::new().dispatch(kernel))
}

/// An activation of a vector, as [`Clamp::apply`] but for the sign of a zero.
#[inline(always)]
pub(super) fn clamp_vector<S: Simd>(simd: S, clamp: Clamp, x: S::f32s) -> S::f32s {
    let (zero, limit) = (simd.splat_f32s(0.0), simd.splat_f32s(clamp.limit));
    let (is_below, is_above) = (simd.less_than_f32s(x, zero), simd.less_than_f32s(limit, x));
    if clamp.slope == 0.0 {
        return simd.select_f32s(is_above, limit, simd.select_f32s(is_below, zero, x));
    }
    let (slope, most) = (simd.splat_f32s(clamp.slope), simd.splat_f32s(f32::MAX));
    let low = simd.mul_f32s(simd.max_f32s(x, simd.splat_f32s(-f32::MAX)), slope);
    let excess = simd.min_f32s(simd.sub_f32s(x, limit), most);
    let high = simd.add_f32s(limit, simd.mul_f32s(slope, excess));
    simd.select_f32s(is_above, high, simd.select_f32s(is_below, low, x))
}
