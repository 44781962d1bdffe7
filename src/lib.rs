//! depthshrinker: finds which activations of a compact CNN can go, finetunes without them, and folds what became
//! linear into dense convolutions, exactly.
//!
//! Layers, top down; a module imports only from those below it, which `tests/layers.rs` holds: [`cli`], [`pipeline`],
//! [`config`], [`report`], [`shrink`], [`check`], [`measure`], [`train`], [`io`], [`networks`], [`data`], [`engine`],
//! [`model`], [`graph`], [`ops`], [`device`], and below them all [`tensor`], [`shape`], [`index`], [`dtype`], [`memory`],
//! [`files`], [`error`] and [`terminal`].

pub mod check;
pub mod cli;
pub mod config;
pub mod data;
pub mod device;
pub mod dtype;
pub mod engine;
pub mod error;
pub mod files;
pub mod graph;
pub mod index;
pub mod io;
pub mod measure;
pub mod memory;
pub mod model;
pub mod networks;
pub mod ops;
pub mod pipeline;
pub mod report;
pub mod shape;
pub mod shrink;
pub mod tensor;
pub mod terminal;
pub mod train;

pub use error::{Error, Result};
