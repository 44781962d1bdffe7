//! Convolutions of every family, kernel, stride, padding and tile.

use super::{Case, On, Output};
use crate::Result;
use crate::engine::{Backpropagated, Sequence, SequenceRun};
use crate::ops::activation::Activation;
use crate::ops::conv::{Bias, Conv, ConvProblem, ConvStep};
use crate::ops::epilogue::{BiasOperand, PlannedEpilogue};
use crate::ops::step::{Operand, ParamId, Place, ValueId, Values};
use crate::shape::{Padding, Shape, Window};

/// n, (h, w, c_in), c_out, (k_h, k_w), (stride_h, stride_w), padding top/left/bottom/right, groups.
pub type ConvRow = (usize, (usize, usize, usize), usize, (usize, usize), (usize, usize), [usize; 4], usize);

/// Sizes that are not square, channels that fill no vector or no tile, odd sizes under stride 2, batch 1.
pub const CONVOLUTIONS: &[ConvRow] = &[
    (2, (9, 7, 16), 24, (1, 1), (1, 1), [0; 4], 1),
    (1, (1, 1, 8), 40, (1, 1), (1, 1), [0; 4], 1),
    (3, (5, 12, 13), 7, (1, 1), (1, 1), [0; 4], 1),
    (5, (28, 11, 48), 8, (1, 1), (1, 1), [0; 4], 1),
    (2, (2, 2, 160), 320, (1, 1), (1, 1), [0; 4], 1),
    (3, (7, 9, 128), 136, (1, 1), (1, 1), [0; 4], 1),
    // Enough tiles for the large ones: of the result, of the input's gradient, of the weights'.
    (1, (64, 64, 8), 512, (1, 1), (1, 1), [0; 4], 1),
    (1, (64, 64, 512), 8, (1, 1), (1, 1), [0; 4], 1),
    (3, (13, 12, 128), 240, (1, 1), (1, 1), [0; 4], 1),
    (1, (15, 13, 72), 72, (1, 1), (1, 1), [0; 4], 1),
    // Each number of chunks that both gradients at once are made for, with both tiles.
    (2, (9, 8, 24), 144, (1, 1), (1, 1), [0; 4], 1),
    (1, (7, 5, 16), 264, (1, 1), (1, 1), [0; 4], 1),
    (1, (10, 9, 64), 384, (1, 1), (1, 1), [0; 4], 1),
    (2, (6, 5, 8), 16, (1, 1), (1, 1), [1; 4], 1),
    (2, (9, 7, 8), 16, (1, 1), (2, 2), [0; 4], 1),
    (2, (9, 7, 48), 48, (3, 3), (1, 1), [1; 4], 48),
    (1, (14, 13, 40), 40, (3, 3), (1, 1), [1; 4], 40),
    (3, (9, 7, 24), 24, (3, 3), (2, 2), [1; 4], 24),
    (2, (8, 6, 16), 16, (3, 3), (2, 2), [0, 0, 1, 1], 16),
    (40, (2, 2, 96), 96, (3, 3), (1, 1), [1; 4], 96),
    (2, (10, 9, 8), 8, (5, 5), (1, 1), [2; 4], 8),
    (2, (11, 10, 20), 20, (5, 5), (2, 2), [2; 4], 20),
    (1, (9, 12, 8), 8, (7, 7), (1, 1), [3; 4], 8),
    (1, (13, 12, 10), 10, (7, 7), (2, 2), [3; 4], 10),
    (1, (13, 12, 11), 11, (7, 7), (2, 2), [3; 4], 11),
    (2, (7, 9, 16), 16, (3, 3), (1, 1), [0; 4], 16),
    (2, (3, 2, 8), 8, (5, 5), (1, 1), [2; 4], 8),
    (2, (7, 9, 8), 8, (1, 3), (1, 2), [0, 1, 0, 1], 8),
    (2, (7, 9, 8), 8, (3, 3), (3, 3), [1; 4], 8),
    (2, (6, 6, 16), 16, (3, 3), (1, 1), [3; 4], 16),
    (2, (9, 7, 3), 16, (3, 3), (2, 2), [1; 4], 1),
    (2, (8, 9, 3), 72, (3, 3), (1, 1), [1; 4], 1),
    (3, (9, 10, 1), 8, (3, 3), (1, 1), [1; 4], 1),
    (1, (11, 7, 1), 24, (3, 3), (2, 2), [0, 0, 1, 1], 1),
    (2, (12, 9, 16), 24, (3, 3), (1, 1), [1; 4], 1),
    (1, (7, 7, 96), 64, (3, 3), (1, 1), [1; 4], 1),
    (1, (64, 64, 8), 512, (1, 2), (1, 1), [0, 0, 0, 1], 1),
    (1, (64, 64, 512), 8, (1, 2), (1, 1), [0, 0, 0, 1], 1),
    (1, (16, 15, 128), 128, (1, 3), (1, 1), [0, 1, 0, 1], 1),
    (2, (11, 8, 5), 9, (5, 5), (2, 2), [2; 4], 1),
    (1, (15, 9, 6), 10, (7, 7), (2, 2), [3; 4], 1),
    (2, (8, 8, 4), 6, (3, 3), (2, 2), [0, 0, 1, 1], 1),
    (2, (5, 6, 12), 18, (3, 3), (1, 1), [1; 4], 2),
    (2, (5, 6, 8), 16, (3, 3), (1, 1), [1; 4], 8),
    (1, (4, 4, 8), 8, (1, 3), (1, 1), [0, 1, 0, 1], 1),
];

/// Rows with more multiply-accumulates than this run only two modes: they test the choice of tiles, and smaller rows test
/// all else.
const MANY_MACS: u64 = 10_000_000;

/// The problem of a row.
///
/// # Panics
/// Never for the rows of the table: each fits its input.
pub fn problem(row: &ConvRow) -> ConvProblem {
    let &(n, (h, w, c_in), c_out, (k_h, k_w), (stride_h, stride_w), [top, left, bottom, right], groups) = row;
    let window = Window { k_h, k_w, stride_h, stride_w, pad: Padding { top, left, bottom, right } };
    let conv = Conv { c_in, c_out, window, groups, bias: Bias::None };
    ConvProblem::new(&conv, Shape::new(h, w, c_in), n).expect("every row of the table fits its input")
}

pub(super) fn name(p: &ConvProblem) -> String {
    let Window { k_h, k_w, stride_h, pad, .. } = p.window;
    let family = format!("{:?}", p.family()).to_lowercase();
    let pad = format!("{}{}{}{}", pad.top, pad.left, pad.bottom, pad.right);
    format!("{family}/n{}_{}_to_{}_k{k_h}x{k_w}_s{stride_h}_p{pad}_g{}", p.n, p.input, p.output.c, p.groups)
}

pub(super) fn cases(row: &ConvRow) -> Vec<Case> {
    let p = problem(row);
    let case = |mode: &str, run: fn(&ConvProblem, &On<'_>) -> Result<Vec<Output>>| {
        Case::new(format!("conv/{}/{mode}", name(&p)), move |on| run(&p, on))
    };
    let mut cases = vec![
        case("finish", |p, on| forward(p, on, Some(Bias::Channel), Some(act(1.5, 0.25)))),
        case("gradient", |p, on| backward(p, on, Bias::Channel, None)),
    ];
    if p.macs() <= MANY_MACS {
        cases.extend([
            case("forward", |p, on| forward(p, on, None, None)),
            case("bias_map", |p, on| forward(p, on, Some(Bias::Map), Some(act(6.0, 0.0)))),
            case("add", |p, on| backward(p, on, Bias::Map, Some(0.5))),
        ]);
    }
    cases
}

fn act(limit: f32, slope: f32) -> Activation {
    Activation { limit: Some(limit), site: None, slope }
}

pub(super) fn terms(p: &ConvProblem) -> usize {
    p.weight_len() / p.output.c
}

/// The convolution in a plan of its own, with the values that its operands are.
struct Planned {
    values: Values,
    x: ValueId,
    w: ValueId,
    bias: Option<ValueId>,
    residual: Option<ValueId>,
    y: ValueId,
    step: ConvStep,
}

impl Planned {
    fn new(p: &ConvProblem, bias: Option<Bias>, act: Option<Activation>) -> Self {
        let mut values = Values::default();
        let (x, y) = (values.activation(p.input), values.activation(p.output));
        let w = values.pinned(Place::Weight(ParamId::new(0)), p.weight_len());
        let len = if bias == Some(Bias::Map) { p.output.len() } else { p.output.c };
        let bias_value = bias.map(|_| values.pinned(Place::Param(ParamId::new(1)), len));
        // Behind an activation comes a residual too, so that the order of both shows.
        let residual = act.map(|_| values.activation(p.output));
        let operand = match (bias, bias_value) {
            (Some(Bias::Map), Some(bias)) => BiasOperand::Map(bias),
            (Some(_), Some(bias)) => BiasOperand::Channel(bias),
            _ => BiasOperand::None,
        };
        let epilogue = PlannedEpilogue { bias: operand, residual, act };
        let problem = p.batch(1);
        let step = ConvStep { problem, x: Operand::Stored(x), w, epilogue, y, statistics: None };
        Self { values, x, w, bias: bias_value, residual, y, step }
    }
}

fn forward(p: &ConvProblem, on: &On<'_>, bias: Option<Bias>, act: Option<Activation>) -> Result<Vec<Output>> {
    let Planned { values, x, w, bias, residual, y, step } = Planned::new(p, bias, act);
    let sequence = Sequence::new(values, vec![Box::new(step)]);
    let mut run = SequenceRun::new(on.device, &sequence, p.n)?;
    on.fill(&mut run, x, 1)?;
    on.fill(&mut run, w, 2)?;
    bias.map_or(Ok(()), |bias| on.fill_floats(&mut run, bias, 4))?;
    residual.map_or(Ok(()), |residual| on.fill(&mut run, residual, 5))?;
    on.spoil(&mut run, y)?;
    run.run();
    Ok(vec![Output::rounded("y", on.get(run.buffer(y))?, terms(p))])
}

/// All gradients; that of x is added to `seed` where there is one.
fn backward(p: &ConvProblem, on: &On<'_>, bias: Bias, seed: Option<f32>) -> Result<Vec<Output>> {
    let Planned { values, x, w, bias, y, step, .. } = Planned::new(p, Some(bias), None);
    let forward = Sequence::new(values, vec![Box::new(step)]);
    let added_to: Vec<ValueId> = seed.map(|_| x).into_iter().collect();
    let Backpropagated { steps, given, gradients } = forward.backward(on.device.backend(), &[y], &added_to);
    let mut run = SequenceRun::new(on.device, &steps, p.n)?;
    on.fill(&mut run, x, 1)?;
    on.fill(&mut run, w, 2)?;
    on.fill(&mut run, given[0], 3)?;
    let of = |value: Option<ValueId>| value.and_then(|value| gradients.of(value));
    let names = ["dx", "dw", "db"].into_iter().zip([of(Some(x)), of(Some(w)), of(bias)]);
    let written: Vec<(&'static str, ValueId)> = names.filter_map(|(name, id)| Some((name, id?))).collect();
    for &(_, id) in &written {
        on.spoil(&mut run, id)?;
    }
    if let (Some(seed), Some(dx)) = (seed, of(Some(x))) {
        on.set(&mut run, dx, |len| vec![seed; len])?;
    }
    run.run();
    let pixels = p.n * p.output.pixels();
    let output = |(name, id): (&'static str, ValueId)| {
        let values = on.get(run.buffer(id))?;
        Ok(match name {
            "dx" => Output::rounded(name, values, terms(p) * p.output.c / p.input.c.max(1) + 1),
            _ => Output::float(name, values, pixels),
        })
    };
    written.into_iter().map(output).collect()
}
