//! The one place where the engine's layout and the ecosystem's meet: NHWC inside, NCHW and OIHW in files.
//!
//! | what | engine | file |
//! |--|--|--|
//! | activation | `[n, h, w, c]` | `[n, c, h, w]` |
//! | dense convolution | `[c_out, k_h, k_w, c_in / groups]` | `[c_out, c_in / groups, k_h, k_w]` |
//! | depthwise convolution | `[k_h, k_w, c]` | `[c, 1, k_h, k_w]` |
//! | pointwise convolution | `[c_out, c_in]` | `[c_out, c_in, 1, 1]` |
//! | bias map | `[h, w, c]` | `[c, h, w]` |
//!
//! All other parameters look the same on both sides.

use crate::graph::{ConvFamily, ParamRole, ParamSpec};

/// Dimensions of a parameter in a file.
pub fn file_shape(spec: &ParamSpec) -> Vec<usize> {
    match (spec.role, spec.shape.as_slice()) {
        (ParamRole::ConvWeight(ConvFamily::Depthwise), &[k_h, k_w, c]) => vec![c, 1, k_h, k_w],
        (ParamRole::ConvWeight(ConvFamily::Pointwise), &[c_out, c_in]) => vec![c_out, c_in, 1, 1],
        (ParamRole::ConvWeight(ConvFamily::Dense), &[c_out, k_h, k_w, c_in]) => vec![c_out, c_in, k_h, k_w],
        (ParamRole::ConvBiasMap, &[h, w, c]) => vec![c, h, w],
        (_, shape) => shape.to_vec(),
    }
}

/// A parameter's numbers from the engine's layout to the file's. `data` has as many elements as `spec`.
pub fn to_file(spec: &ParamSpec, data: &[f32]) -> Vec<f32> {
    match channels_last(spec) {
        Some((outer, pixels, channels)) => swap(data, outer, pixels, channels),
        None => data.to_vec(),
    }
}

/// A parameter's numbers from the file's layout to the engine's. `data` has as many elements as `spec`.
pub fn from_file(spec: &ParamSpec, data: Vec<f32>) -> Vec<f32> {
    match channels_last(spec) {
        Some((outer, pixels, channels)) => swap(&data, outer, channels, pixels),
        None => data,
    }
}

/// Images or activations from `[n, c, h, w]` to `[n, h, w, c]`; `pixels` is h·w.
pub fn nchw_to_nhwc(data: &[f32], channels: usize, pixels: usize) -> Vec<f32> {
    swap(data, data.len() / (channels * pixels).max(1), channels, pixels)
}

/// Images or activations from `[n, h, w, c]` to `[n, c, h, w]`; `pixels` is h·w.
pub fn nhwc_to_nchw(data: &[f32], channels: usize, pixels: usize) -> Vec<f32> {
    swap(data, data.len() / (channels * pixels).max(1), pixels, channels)
}

/// A parameter whose layouts differ, as `[outer, pixels, channels]` in the engine.
fn channels_last(spec: &ParamSpec) -> Option<(usize, usize, usize)> {
    match (spec.role, spec.shape.as_slice()) {
        (ParamRole::ConvWeight(ConvFamily::Depthwise) | ParamRole::ConvBiasMap, &[h, w, c]) => Some((1, h * w, c)),
        (ParamRole::ConvWeight(ConvFamily::Dense), &[c_out, k_h, k_w, c_in]) => Some((c_out, k_h * k_w, c_in)),
        _ => None,
    }
}

/// `[outer, rows, columns]` to `[outer, columns, rows]`.
fn swap(data: &[f32], outer: usize, rows: usize, columns: usize) -> Vec<f32> {
    debug_assert_eq!(data.len(), outer * rows * columns);
    let mut out = Vec::with_capacity(data.len());
    for matrix in data.chunks_exact((rows * columns).max(1)) {
        for column in 0..columns {
            out.extend((0..rows).map(|row| matrix[row * columns + column]));
        }
    }
    out
}
