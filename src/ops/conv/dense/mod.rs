//! Dense and grouped k×k convolution on the CPU.

mod backward;
mod forward;

pub(super) use backward::backward;
pub(super) use forward::forward;

use super::source::Source;

/// A dense kernel reads every input pixel many times over, so its input is always stored.
fn stored<'a>(x: &Source<'a>) -> &'a [f32] {
    match x {
        Source::Stored(x) => x,
        Source::Normalised(_) => panic!("a dense convolution reads stored values; no rule plans anything else for it"),
    }
}

/// Copies the `c_in` channels of a group out of consecutive pixels of `c` channels; `x` starts at the first one's group.
#[inline]
fn copy_group(x: &[f32], c: usize, out: &mut [f32], c_in: usize) {
    if c_in == c {
        out.copy_from_slice(&x[..out.len()]);
    } else {
        for (out, x) in out.chunks_exact_mut(c_in).zip(x.chunks(c)) {
            out.copy_from_slice(&x[..c_in]);
        }
    }
}
