//! Dense and grouped k×k convolution on the CPU.

mod backward;
mod forward;

pub(super) use backward::backward;
pub(super) use forward::forward;

use super::conv_input::Source;

/// A dense kernel reads every input pixel many times over, so its input is always stored.
fn stored<'a>(x: &Source<'a>) -> &'a [f32] {
    match x {
        Source::Stored(x) => x,
        Source::Normalised(_) => unreachable!("the planner stores what a dense convolution reads"),
    }
}
