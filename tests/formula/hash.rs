//! The hash that weights and images are made of, here as in `fixtures/make_network_values.py`.

/// Element i of the tensor of a name: a hash in [-1, 1).
pub fn hashed(name: &str, len: usize) -> Vec<f64> {
    let seed = name.bytes().fold(2_166_136_261u32, |seed, byte| (seed ^ u32::from(byte)).wrapping_mul(16_777_619));
    let element = |i: usize| {
        let mut h = (i as u32).wrapping_mul(2_654_435_761).wrapping_add(seed);
        h ^= h >> 16;
        h = h.wrapping_mul(0x7feb_352d);
        h ^= h >> 15;
        h = h.wrapping_mul(0x846c_a68b);
        h ^= h >> 16;
        f64::from(h) / 2f64.powi(31) - 1.0
    };
    (0..len).map(element).collect()
}
