//! Random numbers as functions of a stream and an index: the same bits on every device, and nothing to keep
//! (`kernels/random.cuh`).

/// The finaliser of SplitMix64 (Steele, Lea and Flood, 2014).
pub fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// Nearly normal noise: the sum of twelve uniform numbers of 16 bits, whose variance is 1. In integers until the end, so
/// that it is exact.
pub fn noise(stream: u64, index: u64) -> f32 {
    let sixteens = |bits: u64| (0..4).map(|i| (bits >> (16 * i)) as u16).map(i32::from).sum::<i32>();
    let sum: i32 = (0..3).map(|part| sixteens(mix(stream.wrapping_add(3 * index + part)))).sum();
    // The twelve means are 65535 / 2.
    (sum - 6 * 65535) as f32 / 65536.0
}
