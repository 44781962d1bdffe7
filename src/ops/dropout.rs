//! Dropout whose mask is a function of (seed, step, element), so that nothing needs saving and a resumed run repeats it.

use super::cuda;
use crate::device::{View, ViewMut};

/// y = x·mask/(1 − p), and likewise the gradient: dx (+)= dy·mask/(1 − p).
pub fn apply(p: f32, (seed, step): (u64, u64), x: View<'_>, y: ViewMut<'_>, accumulate: bool) {
    if let View::Gpu(x) = x {
        return cuda::elementwise::dropout(p, seed, step, x, &y.gpu(), accumulate);
    }
    let (x, y) = (x.host(), y.host());
    let scale = 1.0 / (1.0 - p);
    let stream = mix(seed ^ mix(step));
    // The share of 2^32 below which an element is dropped.
    let threshold = (f64::from(p) * 4_294_967_296.0) as u64;
    for (i, (y, &x)) in y.iter_mut().zip(x).enumerate() {
        let kept = mix(stream.wrapping_add(i as u64)) >> 32 >= threshold;
        let value = if kept { x * scale } else { 0.0 };
        *y = if accumulate { *y + value } else { value };
    }
}

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
