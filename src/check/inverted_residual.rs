//! Fused inverted residuals of every kernel, stride, tile and shortcut.

use super::{Case, On, Output};
use crate::engine::{Engine, EngineOptions, Fusion};
use crate::graph::{Activation, Bias, Conv, GraphBuilder, NodeId, Op};
use crate::model::{Model, Weights};
use crate::ops::activation::Clamp;
use crate::ops::inverted_residual::InvertedResidualProblem;
use crate::shape::{Padding, Shape, Window};
use crate::tensor::Tensor;
use crate::{Error, Result};

/// A block of the table.
#[derive(Debug, Clone, Copy)]
pub struct BlockRow {
    /// Images.
    pub n: usize,
    /// Height, width and channels of the input.
    pub input: (usize, usize, usize),
    /// Hidden channels; `None` for a block without expansion.
    pub hidden: Option<usize>,
    /// Channels of the output.
    pub c_out: usize,
    /// Kernel, stride, and padding top/left/bottom/right.
    pub window: (usize, usize, [usize; 4]),
    /// Whether the input is added to the result.
    pub shortcut: bool,
    /// Upper bound of an activation after that.
    pub last: Option<f32>,
}

impl BlockRow {
    const fn new(n: usize, input: (usize, usize, usize), hidden: usize, c_out: usize, k: usize, stride: usize) -> Self {
        let shortcut = stride == 1 && input.2 == c_out;
        Self { n, input, hidden: Some(hidden), c_out, window: (k, stride, [k / 2; 4]), shortcut, last: None }
    }

    /// The problem of the row.
    ///
    /// # Panics
    /// Never for the rows of the table: each fits its input.
    pub fn problem(&self) -> InvertedResidualProblem {
        let ((h, w, c), (k, stride, [top, left, bottom, right])) = (self.input, self.window);
        let pad = Padding { top, left, bottom, right };
        let window = Window { pad, ..Window::square(k, stride, 0) };
        InvertedResidualProblem::new(self.n, Shape::new(h, w, c), self.hidden, self.c_out, window)
            .expect("every row of the table fits its input")
    }

    /// The activations after the expansion, the depthwise convolution and the projection.
    pub fn activations(&self) -> [Clamp; 3] {
        let last = self.last.map_or(Clamp::NONE, |limit| Clamp::new(Some(limit), 0.0));
        [Clamp::new(Some(2.0), 0.0), Clamp::new(Some(1.5), 0.1), last]
    }

    /// The row in words.
    pub fn name(&self) -> String {
        let (p, (k, stride, [top, left, bottom, right])) = (self.problem(), self.window);
        let shortcut = if self.shortcut { "_shortcut" } else { "" };
        let hidden = if self.hidden.is_some() { format!("_{}", p.hidden) } else { String::new() };
        format!("n{}_{}{hidden}_to_{}_k{k}_s{stride}_p{top}{left}{bottom}{right}{shortcut}", p.n, p.input, self.c_out)
    }
}

/// Sizes that are not square and fill no tile, channels that fill no vector and no slice, odd sizes under stride 2.
pub const BLOCKS: &[BlockRow] = &[
    BlockRow::new(2, (9, 7, 16), 96, 16, 3, 1),
    BlockRow::new(1, (17, 10, 24), 72, 40, 3, 1),
    BlockRow::new(1, (8, 9, 80), 160, 80, 3, 1),
    BlockRow::new(1, (7, 5, 40), 48, 136, 3, 1),
    BlockRow::new(2, (6, 11, 13), 39, 13, 3, 1),
    BlockRow::new(1, (5, 6, 7), 45, 67, 3, 1),
    BlockRow::new(1, (9, 12, 24), 56, 24, 5, 1),
    BlockRow::new(2, (3, 2, 8), 40, 72, 5, 1),
    BlockRow::new(1, (10, 7, 5), 31, 5, 5, 1),
    BlockRow::new(2, (11, 19, 16), 96, 24, 3, 2),
    BlockRow::new(1, (7, 9, 64), 64, 168, 3, 2),
    BlockRow::new(1, (9, 5, 3), 18, 11, 3, 2),
    BlockRow::new(1, (13, 10, 24), 72, 40, 5, 2),
    BlockRow::new(2, (7, 5, 9), 27, 6, 5, 2),
    // In 16 bits bands of rows: some of an image, whole images, the last of them fewer; panels, slices and channels that are not
    // filled; and every number of channels that a block has.
    BlockRow::new(1, (14, 14, 64), 96, 64, 3, 1),
    BlockRow::new(2, (13, 14, 40), 72, 88, 3, 1),
    BlockRow::new(1, (12, 12, 96), 64, 160, 3, 1),
    BlockRow::new(5, (5, 6, 24), 64, 24, 3, 1),
    BlockRow::new(2, (14, 13, 64), 64, 96, 3, 2),
    BlockRow { window: (3, 2, [0, 0, 1, 1]), ..BlockRow::new(1, (28, 28, 32), 48, 104, 3, 2) },
    // No expansion, as in the first block of a network; by vectors and without.
    BlockRow { hidden: None, ..BlockRow::new(2, (10, 9, 40), 0, 16, 3, 1) },
    BlockRow { hidden: None, ..BlockRow::new(1, (7, 8, 11), 0, 11, 5, 2) },
    // TensorFlow's padding, none at all, and an activation after the shortcut.
    BlockRow { window: (3, 2, [0, 0, 1, 1]), ..BlockRow::new(1, (8, 6, 16), 48, 24, 3, 2) },
    BlockRow { window: (3, 1, [0; 4]), ..BlockRow::new(1, (9, 6, 8), 24, 16, 3, 1) },
    BlockRow { last: Some(1.5), ..BlockRow::new(1, (6, 9, 16), 32, 16, 3, 1) },
];

/// Numbers that the block's parameters and its input are made of, none of which saturates most activations.
#[derive(Debug, Clone)]
pub struct BlockData {
    /// `[n, h_in, w_in, c_in]`.
    pub x: Vec<f32>,
    /// Weights of expansion (empty without), depthwise convolution and projection.
    pub w: [Vec<f32>; 3],
    /// Their biases.
    pub b: [Vec<f32>; 3],
}

impl BlockData {
    /// The data of a problem, a function of it alone.
    pub fn new(p: &InvertedResidualProblem) -> Self {
        // Sums of k products of numbers in -1..1 are about √k / 3.
        let scaled = |seed, len, k: usize| -> Vec<f32> {
            super::numbers(seed, len).iter().map(|v| v * 3.0 / (k as f32).sqrt()).collect()
        };
        let (expand, taps, hidden) = (p.expand(), p.window.taps(), p.hidden);
        let w = [
            scaled(2, expand.map_or(0, |conv| conv.weight_len()), p.input.c),
            scaled(3, taps * hidden, taps),
            scaled(4, hidden * p.output.c, hidden),
        ];
        let b = [(5, expand.map_or(0, |_| hidden)), (6, hidden), (7, p.output.c)].map(|(s, c)| super::numbers(s, c));
        Self { x: super::numbers(1, p.n * p.input.len()), w, b }
    }
}

impl BlockRow {
    /// The block as a network of its own, batch-norm folded, whose output is the block's.
    ///
    /// # Errors
    /// None that can be expected.
    pub fn model(&self, round: impl Fn(Vec<f32>) -> Vec<f32>) -> Result<Model> {
        let p = self.problem();
        let mut b = GraphBuilder::new("block", p.input);
        let acts =
            self.activations().map(|clamp| Activation { limit: Some(clamp.limit), site: None, slope: clamp.slope });
        let mut x = NodeId::INPUT;
        let names = ["expand", "depthwise", "project"];
        let convs = [p.expand(), Some(p.depthwise()), Some(p.project())];
        for ((name, conv), act) in names.into_iter().zip(convs).zip(acts) {
            let Some(conv) = conv else { continue };
            let biased = Conv {
                bias: Bias::Channel,
                ..GraphBuilder::conv(conv.input.c, conv.output.c, conv.window, conv.groups)
            };
            x = b.push(name, Op::Conv(biased), &[x]);
            let is_last = name == "project";
            if is_last && self.shortcut {
                x = b.push("add", Op::Add, &[x, NodeId::INPUT]);
            }
            if !is_last || self.last.is_some() {
                x = b.push(format!("{name}.act"), Op::Activation(act), &[x]);
            }
        }
        let (graph, data) = (b.finish()?, BlockData::new(&p));
        let mut weights = Weights::new();
        for param in graph.params()? {
            let of =
                names.iter().position(|name| param.name.starts_with(name)).expect("every parameter is a convolution's");
            let values = if param.name.ends_with("bias") { data.b[of].clone() } else { round(data.w[of].clone()) };
            weights.insert(param.name, Tensor { shape: param.shape, data: values });
        }
        Model::new(graph, weights)
    }
}

pub(super) fn cases() -> impl Iterator<Item = Case> {
    BLOCKS.iter().map(|row| Case::new(format!("inverted_residual/{}", row.name()), move |on| run(row, on)))
}

/// The block as one step, and as one step a node: both are compared with the host's.
fn run(row: &BlockRow, on: &On<'_>) -> Result<Vec<Output>> {
    let p = row.problem();
    let model = row.model(|weights| on.round(weights))?;
    let x = on.round(BlockData::new(&p).x);
    let output = |fusion: Fusion, steps: usize| {
        let options = EngineOptions { batch: p.n, fusion, training: false, taps: Vec::new() };
        let mut engine = Engine::new(on.device, &model, &options)?;
        let planned = engine.plan().steps.len();
        if planned != steps {
            return Err(Error::Graph(format!("a block of {steps} steps was planned as {planned}")));
        }
        let mut y = vec![0.0; p.n * p.output.len()];
        engine.forward(&x)?.read(&mut y)?;
        Ok(y)
    };
    // The hidden values of a device are rounded twice before they are summed.
    let terms = p.input.c + p.window.taps() + p.hidden;
    let nodes = model.graph.nodes.len() - 1;
    Ok(vec![
        Output::derived("y", output(Fusion::Block, 1)?, terms, 3.0),
        Output::derived("y of single nodes", output(Fusion::PerNode, nodes)?, terms, 4.0),
    ])
}
