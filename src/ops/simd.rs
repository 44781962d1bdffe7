//! Choosing the vector instructions at run time, so that one portable binary uses what the processor has.

use pulp::{Arch, Simd};

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

/// dy·φ'(x), as [`Clamp::derivative`].
#[inline(always)]
pub(super) fn derivative_vector<S: Simd>(simd: S, clamp: Clamp, x: S::f32s, dy: S::f32s) -> S::f32s {
    let (zero, limit) = (simd.splat_f32s(0.0), simd.splat_f32s(clamp.limit));
    let is_inside = simd.and_m32s(simd.less_than_f32s(zero, x), simd.less_than_f32s(x, limit));
    let outside = simd.mul_f32s(dy, simd.splat_f32s(clamp.slope));
    simd.select_f32s(is_inside, dy, outside)
}

/// Writes `$body` down for each constant `$i` below `$n` among the first 12, or those that are given: sums are registers only
/// where every index of theirs is a constant from the start.
macro_rules! unrolled {
    ($i:ident < $n:ident, $body:expr) => {
        unrolled!($i < $n, $body, 0 1 2 3 4 5 6 7 8 9 10 11)
    };
    ($i:ident < $n:ident, $body:expr, $($k:literal)*) => {{
        $(if $k < $n {
            const $i: usize = $k;
            $body
        })*
    }};
}
pub(super) use unrolled;

/// A vector of up to as many elements; those that the slice lacks are zero.
#[inline(always)]
pub(super) fn load<S: Simd>(simd: S, from: &[f32]) -> S::f32s {
    match S::as_simd_f32s(from).0 {
        [all] => *all,
        _ => simd.partial_load_f32s(from),
    }
}

/// The opposite of [`load`].
#[inline(always)]
pub(super) fn store<S: Simd>(simd: S, to: &mut [f32], vector: S::f32s) {
    match S::as_mut_simd_f32s(to).0 {
        [all] => *all = vector,
        _ => simd.partial_store_f32s(to, vector),
    }
}
