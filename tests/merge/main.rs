//! Stage 3 and the surgery before it: merged networks compute what unmerged ones compute, against a reference
//! evaluator that shares no arithmetic with the library.

mod blocks;
mod chains;
mod command;
mod engine;
mod expand;
mod layers;
mod networks;
mod oracles;
mod published;
mod reference;
mod refusals;
mod residual;
mod segments;
mod surgery;
mod verification;
