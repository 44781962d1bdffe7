//! Choosing the vector instructions at run time, so that one portable binary uses what the processor has.
//!
//! `DEPTHSHRINKER_SIMD` forces a narrower choice than the widest: `avx512`, `avx2`, `neon` or `scalar`.

use std::sync::LazyLock;

use pulp::{Arch, Simd, WithSimd};

use super::activation::Clamp;
use crate::device::float_mode::flush_subnormals;
use crate::{Error, Result};

/// Elements of a vector at most.
pub(super) const MAX_LANES: usize = 16;
/// The variable that forces vector instructions.
const VARIABLE: &str = "DEPTHSHRINKER_SIMD";

/// The vector instructions of this process.
static ARCH: LazyLock<std::result::Result<Arch, String>> = LazyLock::new(|| match std::env::var(VARIABLE) {
    Ok(name) if !name.is_empty() => named(&name).ok_or_else(|| {
        format!("{VARIABLE}={name}: this processor has no such vector instructions; it has {}", available().join(", "))
    }),
    _ => Ok(Arch::new()),
});

/// Vector instructions by name, where the processor has them.
fn named(name: &str) -> Option<Arch> {
    match name {
        "scalar" => Some(Arch::Scalar),
        #[cfg(target_arch = "x86_64")]
        "avx2" => pulp::x86::V3::try_new().map(Arch::V3),
        #[cfg(target_arch = "x86_64")]
        "avx512" => pulp::x86::V4::try_new().map(Arch::V4),
        #[cfg(target_arch = "aarch64")]
        "neon" => pulp::aarch64::Neon::try_new().map(Arch::Neon),
        _ => None,
    }
}

/// Names of what this processor has, widest first.
fn available() -> Vec<&'static str> {
    ["avx512", "avx2", "neon", "scalar"].into_iter().filter(|name| named(name).is_some()).collect()
}

/// Says whether the forced vector instructions, if any are, can be used.
///
/// # Errors
/// Where the processor lacks them.
pub(crate) fn check_forced() -> Result<()> {
    ARCH.as_ref().map(|_| ()).map_err(|text| Error::Config(text.clone()))
}

/// Runs a kernel with explicit vectors, as [`vectorised`] runs a closure.
///
/// # Panics
/// Where vector instructions are forced that the processor lacks ([`check_forced`]).
#[inline]
pub(crate) fn dispatch<K: WithSimd>(kernel: K) -> K::Output {
    flush_subnormals(|| arch().dispatch(kernel))
}

/// The number of elements of a vector.
pub(super) fn lanes() -> usize {
    struct Lanes;
    impl WithSimd for Lanes {
        type Output = usize;

        #[inline(always)]
        fn with_simd<S: Simd>(self, _: S) -> usize {
            S::F32_LANES
        }
    }
    arch().dispatch(Lanes)
}

/// The vector instructions that are used.
#[inline]
fn arch() -> Arch {
    *ARCH.as_ref().unwrap_or_else(|text| panic!("{text}"))
}

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
    flush_subnormals(|| arch().dispatch(Body(body)))
}

/// An activation of a vector, as [`Clamp::apply`] but for the sign of a zero.
#[inline(always)]
pub(super) fn clamp_vector<S: Simd>(simd: S, clamp: Clamp, x: S::f32s) -> S::f32s {
    let (zero, limit) = (simd.splat_f32s(0.0), simd.splat_f32s(clamp.limit));
    let (is_below, is_above) = (simd.less_than_f32s(x, zero), simd.less_than_f32s(limit, x));
    if clamp.slope == 0.0 {
        if S::F32_LANES == 1 {
            return simd.select_f32s(is_above, limit, simd.select_f32s(is_below, zero, x));
        }
        // Of two operands vector instructions give the second where either is not-a-number, or both are.
        return simd.min_f32s(limit, simd.max_f32s(zero, x));
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

/// x − φ(x) for the activation without slope, as [`Clamp::excess`].
#[inline(always)]
pub(super) fn excess_vector<S: Simd>(simd: S, clamp: Clamp, x: S::f32s) -> S::f32s {
    let (zero, limit) = (simd.splat_f32s(0.0), simd.splat_f32s(clamp.limit));
    let low = simd.select_f32s(simd.less_than_f32s(x, zero), x, zero);
    simd.select_f32s(simd.less_than_f32s(limit, x), simd.sub_f32s(x, limit), low)
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

/// `$body` with `$name` as the constant that a number from 1 to 12 is.
macro_rules! with_constant {
    ($number:expr, $name:ident => $body:expr) => {
        with_constant!($number, $name => $body, 1 2 3 4 5 6 7 8 9 10 11)
    };
    ($number:expr, $name:ident => $body:expr, $($k:literal)*) => {
        match $number {
            $($k => {
                const $name: usize = $k;
                $body
            })*
            _ => {
                const $name: usize = 12;
                $body
            }
        }
    };
}
pub(super) use with_constant;

/// Asks for a line of memory, to the second-level cache; a hint without effect where processors have none, or there is no memory.
#[inline(always)]
pub(super) fn prefetch(at: *const f32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which never faults.
    unsafe {
        use core::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T1>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

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
