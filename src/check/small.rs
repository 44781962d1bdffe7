//! Everything that is neither a convolution nor a batch-norm.

use super::{Case, On, Output};
use crate::Result;
use crate::device::Device;
use crate::engine::{Sequence, SequenceRun};
use crate::ops::activation::{self, Act, Activation, ActivationStep};
use crate::ops::augment::{ByteImages, ByteTables, ImageRoom, ImageView};
use crate::ops::dropout::DropoutStream;
use crate::ops::linear::{Linear, LinearProblem, LinearStep};
use crate::ops::loss::{Gradient, LossRecord, SoftTarget, cross_entropy, distillation, feature_mse};
use crate::ops::optimizer::{Optimizer, OptimizerState, ParamSpan, Update};
use crate::ops::pad::{PadProblem, PadStep};
use crate::ops::pool::PoolProblem;
use crate::ops::pool::average::AvgPoolStep;
use crate::ops::pool::global::GlobalPoolStep;
use crate::ops::pool::max::MaxPoolStep;
use crate::ops::step::{ParamId, Place, Sink, SiteId, Step, ValueId, Values};
use crate::ops::{add, copy, dropout};
use crate::shape::{Lines, Padding, Shape, Window};

pub(super) fn cases() -> Vec<Case> {
    let case = |name: &str, run: fn(&On<'_>) -> Result<Vec<Output>>| Case::new(name.to_owned(), run);
    let mut cases = vec![
        case("linear/7x33_to_10", |on| linear_case(LinearProblem { n: 7, c_in: 33, c_out: 10 }, on)),
        case("linear/130x64_to_16", |on| linear_case(LinearProblem { n: 130, c_in: 64, c_out: 16 }, on)),
        case("pool/3x20x24", |on| pool_case(3, Shape::new(4, 5, 24), on)),
        case("pool/2x49x13", |on| pool_case(2, Shape::new(7, 7, 13), on)),
        case("max_pool/3x3_s2", |on| max_pool_case(2, Shape::new(9, 12, 16), Window::square(3, 2, 1), on)),
        case("max_pool/3x3_s1_odd", |on| max_pool_case(1, Shape::new(7, 5, 13), Window::square(3, 1, 1), on)),
        case("max_pool/2x2_s2", |on| max_pool_case(3, Shape::new(8, 7, 40), Window::square(2, 2, 0), on)),
        case("max_pool/5x2_asymmetric", |on| max_pool_case(2, Shape::new(11, 6, 8), asymmetric(), on)),
        case("avg_pool/3x3_s2", |on| avg_pool_case(2, Shape::new(9, 12, 16), Window::square(3, 2, 1), on)),
        case("avg_pool/3x3_s1_odd", |on| avg_pool_case(1, Shape::new(7, 5, 13), Window::square(3, 1, 1), on)),
        case("avg_pool/2x2_s2", |on| avg_pool_case(3, Shape::new(8, 7, 40), Window::square(2, 2, 0), on)),
        case("avg_pool/5x2_asymmetric", |on| avg_pool_case(2, Shape::new(11, 6, 8), asymmetric(), on)),
        case("pad/zeros_around", |on| pad_case(2, Shape::new(7, 5, 16), [1, 2, 0, 1], on)),
        case("pad/cut_off", |on| pad_case(3, Shape::new(9, 8, 13), [-1, -2, -3, 0], on)),
        case("pad/both", |on| pad_case(1, Shape::new(5, 9, 40), [2, -1, -2, 3], on)),
        case("dropout/5000", dropout_case),
        case("augment/5x9x8x4", |on| augment_case(Shape::new(9, 8, 4), on)),
        case("augment/3x7x5x3", |on| augment_case(Shape::new(7, 5, 3), on)),
        case("activation/relu6", |on| activation_case(act(0.7, 0.0), 4999, on)),
        case("activation/leaky", |on| activation_case(act(0.5, 0.3), 70_001, on)),
        case("activation/infinite", infinite_case),
        case("cross_entropy/9x10", |on| cross_entropy_case(9, 10, on)),
        case("cross_entropy/3x1000", |on| cross_entropy_case(3, 1000, on)),
        case("cross_entropy/not_finite", not_finite_case),
        case("distillation/5x17", |on| distillation_case(5, 17, on)),
        case("feature_mse/6007", feature_case),
        case("optimizer/sgd", |on| optimizer_case(Optimizer::Sgd { momentum: 0.9, nesterov: false }, 0.0, on)),
        case("optimizer/nesterov_clipped", |on| optimizer_case(Optimizer::default(), 1.5, on)),
        case("optimizer/adamw_clipped", |on| {
            optimizer_case(Optimizer::AdamW { beta1: 0.9, beta2: 0.99, eps: 1e-8 }, 2.0, on)
        }),
    ];
    // A start that allows vectors, and one that does not.
    for start in [0, 1] {
        cases.push(Case::new(format!("add/from_{start}"), move |on| add_case(start, on)));
    }
    cases
}

/// A step from x to y alone.
struct Unary {
    values: Values,
    step: Box<dyn Step>,
    x: ValueId,
    y: ValueId,
    n: usize,
}

/// Lengths of the sums behind what a step gives.
#[derive(Clone, Copy)]
struct Terms {
    y: usize,
    dx: usize,
}

/// The step's result, and the gradient of x, written and added to twos.
fn unary_case(unary: Unary, input: &[f32], terms: Terms, on: &On<'_>) -> Result<Vec<Output>> {
    let Unary { values, step, x, y, n } = unary;
    let forward = Sequence::new(values, vec![step]);
    let fill = |run: &mut SequenceRun| {
        for (id, value) in forward.values.iter() {
            match value.place {
                Place::Weight(_) => on.fill(run, id, 2)?,
                Place::Param(_) => on.fill_floats(run, id, 3)?,
                _ => {}
            }
        }
        on.set(run, x, |_| input.to_vec())
    };
    let mut run = SequenceRun::new(on.device, &forward, n)?;
    fill(&mut run)?;
    on.spoil(&mut run, y)?;
    run.run();
    let mut outputs = vec![Output::rounded("y", on.get(run.buffer(y))?, terms.y)];
    for added_to in [&[][..], &[x]] {
        let back = forward.backward(on.device.backend(), &[y], added_to);
        let mut run = SequenceRun::new(on.device, &back.steps, n)?;
        fill(&mut run)?;
        on.fill(&mut run, back.given[0], 4)?;
        let dx = back.gradients.of(x).expect("every input has a gradient");
        on.set(&mut run, dx, |len| vec![if added_to.is_empty() { f32::NAN } else { 2.0 }; len])?;
        for (id, value) in back.steps.values.iter() {
            match value.place {
                Place::ParamGradient(_) => on.spoil(&mut run, id)?,
                Place::Score(_) => on.set(&mut run, id, |len| vec![0.5; len])?,
                _ => {}
            }
        }
        run.run();
        let name = if added_to.is_empty() { "dx" } else { "dx, added" };
        outputs.push(Output::rounded(name, on.get(run.buffer(dx))?, terms.dx));
        for (id, value) in back.steps.values.iter() {
            match value.place {
                Place::ParamGradient(_) => outputs.push(Output::float("dw or db", on.get(run.buffer(id))?, n)),
                Place::Score(_) => outputs.push(Output::float("score", on.get(run.buffer(id))?, input.len())),
                _ => {}
            }
        }
    }
    Ok(outputs)
}

fn linear_case(p: LinearProblem, on: &On<'_>) -> Result<Vec<Output>> {
    let LinearProblem { n, c_in, c_out } = p;
    let mut values = Values::default();
    let (x, y) = (values.activation(Shape::new(1, 1, c_in)), values.activation(Shape::new(1, 1, c_out)));
    let (w, b) = (
        values.pinned(Place::Weight(ParamId::new(0)), c_in * c_out),
        values.pinned(Place::Param(ParamId::new(1)), c_out),
    );
    let step = Box::new(LinearStep { layer: Linear { c_in, c_out }, x, w, b, y });
    let terms = Terms { y: c_in, dx: c_out };
    unary_case(Unary { values, step, x, y, n }, &on.numbers(1, n * c_in), terms, on)
}

fn pool_case(n: usize, input: Shape, on: &On<'_>) -> Result<Vec<Output>> {
    let mut values = Values::default();
    let (x, y) = (values.activation(input), values.activation(Shape::new(1, 1, input.c)));
    let step = Box::new(GlobalPoolStep { input, x, y });
    let terms = Terms { y: input.pixels(), dx: 1 };
    unary_case(Unary { values, step, x, y, n }, &on.numbers(1, n * input.len()), terms, on)
}

/// A window without symmetry, whose stride leaves pixels that no window holds.
fn asymmetric() -> Window {
    let pad = Padding { top: 4, left: 0, bottom: 1, right: 1 };
    Window { k_h: 5, k_w: 2, stride_h: 3, stride_w: 3, pad }
}

fn max_pool_case(n: usize, input: Shape, window: Window, on: &On<'_>) -> Result<Vec<Output>> {
    let (h, w) = window.output(input.h, input.w).expect("a row of the table fits");
    let problem = PoolProblem { n: 1, input, output: Shape::new(h, w, input.c), window };
    let mut values = Values::default();
    let (x, y) = (values.activation(input), values.activation(problem.output));
    let step = Box::new(MaxPoolStep { problem, x, y });
    // Few different values, so that windows have ties.
    let numbers: Vec<f32> = super::numbers(1, n * input.len()).iter().map(|v| (v * 3.0).round()).collect();
    unary_case(Unary { values, step, x, y, n }, &numbers, Terms { y: 1, dx: window.taps() }, on)
}

fn avg_pool_case(n: usize, input: Shape, window: Window, on: &On<'_>) -> Result<Vec<Output>> {
    let (h, w) = window.output(input.h, input.w).expect("a row of the table fits");
    let problem = PoolProblem { n: 1, input, output: Shape::new(h, w, input.c), window };
    let mut values = Values::default();
    let (x, y) = (values.activation(input), values.activation(problem.output));
    let step = Box::new(AvgPoolStep { problem, x, y });
    let terms = Terms { y: window.taps(), dx: window.taps() };
    unary_case(Unary { values, step, x, y, n }, &on.numbers(1, n * input.len()), terms, on)
}

/// Amounts above, left, below and right.
fn pad_case(n: usize, input: Shape, [top, left, bottom, right]: [isize; 4], on: &On<'_>) -> Result<Vec<Output>> {
    let size = |size: usize, before: isize, after: isize| (size as isize + before + after) as usize;
    let output = Shape::new(size(input.h, top, bottom), size(input.w, left, right), input.c);
    let problem = PadProblem { n: 1, input, output, top, left };
    let mut values = Values::default();
    let (x, y) = (values.activation(input), values.activation(output));
    let step = Box::new(PadStep { problem, x, y: Sink { value: y, add: false } });
    unary_case(Unary { values, step, x, y, n }, &on.numbers(1, n * input.len()), Terms { y: 1, dx: 1 }, on)
}

fn dropout_case(on: &On<'_>) -> Result<Vec<Output>> {
    let len = 5000;
    let x = on.put(&on.numbers(1, len))?;
    let (mut y, mut added) = (on.room(len)?, on.put(&vec![1.0; len])?);
    let mut stream = DropoutStream::new(on.device)?;
    stream.set(7, 3)?;
    dropout::apply(0.2, &stream, x.view(0..len), y.view_mut(0..len), false);
    dropout::apply(0.2, &stream, x.view(0..len), added.view_mut(0..len), true);
    Ok(vec![Output::rounded("y", on.get(&y)?, 1), Output::rounded("added", on.get(&added)?, 1)])
}

/// Images seen shifted, flipped, erased to the mean and to noise.
fn augment_case(shape: Shape, on: &On<'_>) -> Result<Vec<Output>> {
    let len = shape.len();
    let tables = ByteTables::new(&vec![0.4; shape.c], &vec![0.25; shape.c]);
    let mut images = ByteImages::new(on.device, shape, tables, ImageRoom { images: 4, batch: 5 })?;
    let pixels: Vec<u8> = (0..4 * len).map(|i| (i * 37 % 251) as u8).collect();
    images.set_pixels(&pixels)?;
    let view = |image, down, right, flip| ImageView { image, down, right, flip, ..ImageView::default() };
    let erased = |noisy| ImageView { stream: 9, top: 1, left: 2, height: 4, width: 3, noisy, ..view(1, 1, 0, 0) };
    let views = [view(3, 0, 0, 0), view(0, -2, 3, 0), view(2, 3, -1, 1), erased(0), erased(1)];
    images.set_views(&views)?;
    let mut y = on.room(views.len() * len)?;
    images.write(y.view_mut(0..views.len() * len));
    Ok(vec![Output::rounded("y", on.get(&y)?, 1)])
}

fn activation_case(act: Activation, len: usize, on: &On<'_>) -> Result<Vec<Output>> {
    let shape = Shape::new(1, len, 1);
    let mut values = Values::default();
    let (x, y) = (values.activation(shape), values.activation(shape));
    let step = Box::new(ActivationStep { shape, act, x, y });
    unary_case(Unary { values, step, x, y, n: 1 }, &on.numbers(1, len), Terms { y: 1, dx: 1 }, on)
}

fn act(limit: f32, slope: f32) -> Activation {
    Activation { limit: Some(limit), site: Some(SiteId::new(0)), slope }
}

/// What a 16-bit sum that is too large becomes is brought back between the bounds.
fn infinite_case(on: &On<'_>) -> Result<Vec<Output>> {
    let x = on.put(&[f32::INFINITY, f32::NEG_INFINITY, 3.0, 6e4, -6e4])?;
    let mut y = on.room(5)?;
    let shape = Lines { lines: 1, w: 5, c: 1 };
    activation::forward(Act::new(Some(6.0), 0.0), shape, x.view(0..5), y.view_mut(0..5));
    Ok(vec![Output::rounded("y", on.get(&y)?, 1)])
}

fn add_case(start: usize, on: &On<'_>) -> Result<Vec<Output>> {
    let len = 3001;
    let (a, b) = (on.put(&on.numbers(1, len))?, on.put(&on.numbers(2, len))?);
    let mut z = on.put(&vec![0.0; len])?;
    let (mut copied, mut summed) = (on.put(&vec![0.0; len])?, on.put(&vec![1.0; len])?);
    add::forward(a.view(start..len), b.view(start..len), z.view_mut(start..len));
    copy::copy(a.view(start..len), copied.view_mut(start..len));
    copy::accumulate(b.view(start..len), summed.view_mut(start..len));
    // Parameters are copied into the network's type the same way.
    let parameters = on.put_float(&super::numbers(3, len))?;
    let mut own = on.put(&vec![0.0; len])?;
    copy::copy(parameters.view(start..len), own.view_mut(start..len));
    Ok(vec![
        Output::rounded("z", on.get(&z)?, 1),
        Output::rounded("copy", on.get(&copied)?, 1),
        Output::rounded("sum", on.get(&summed)?, 1),
        Output::rounded("copy of parameters", on.get(&own)?, 1),
    ])
}

/// Logits between ±8.
fn logits(on: &On<'_>, seed: u64, len: usize) -> Vec<f32> {
    on.round(super::numbers(seed, len).iter().map(|v| 8.0 * v).collect())
}

/// A record of a batch of n images.
fn record(on: &On<'_>, n: usize, classes: usize) -> Result<LossRecord> {
    let labels: Vec<u32> = (0..n).map(|i| ((i * 7 + 3) % classes) as u32).collect();
    let mut record = LossRecord::new(on.device, n, classes)?;
    record.begin(&labels)?;
    Ok(record)
}

fn sums(record: &LossRecord) -> Result<Output> {
    let sum = record.sum()?;
    Ok(Output::float("loss and hits", vec![sum.loss as f32, sum.correct as f32], record.images()))
}

fn cross_entropy_case(n: usize, classes: usize, on: &On<'_>) -> Result<Vec<Output>> {
    let (z, scale) = (on.put(&logits(on, 1, n * classes))?, on.put_float(&[64.0])?);
    let mut d = on.room(n * classes)?;
    let (mut with, mut without) = (record(on, n, classes)?, record(on, n, classes)?);
    let view = z.view(0..n * classes);
    let gradient = Gradient { to: d.view_mut(0..n * classes), scale: Some(scale.view(0..1)) };
    cross_entropy(&mut with, view, 0.1, Some(gradient))?;
    cross_entropy(&mut without, view, 0.1, None)?;
    Ok(vec![sums(&with)?, sums(&without)?, Output::rounded("gradient", on.get(&d)?, classes)])
}

fn distillation_case(n: usize, classes: usize, on: &On<'_>) -> Result<Vec<Output>> {
    let len = n * classes;
    let (student, teacher) = (on.put(&logits(on, 1, len))?, on.put(&logits(on, 2, len))?);
    let (mut d, scale) = (on.room(len)?, on.put_float(&[16.0])?);
    let target = SoftTarget { teacher: teacher.view(0..len), alpha: 0.7, temperature: 3.0 };
    let mut record = record(on, n, classes)?;
    let gradient = Gradient { to: d.view_mut(0..len), scale: Some(scale.view(0..1)) };
    distillation(&mut record, student.view(0..len), target, gradient)?;
    Ok(vec![sums(&record)?, Output::rounded("gradient", on.get(&d)?, classes)])
}

/// Rows in which no class is the likeliest, whatever their label, and one in which the label is.
fn not_finite_case(on: &On<'_>) -> Result<Vec<Output>> {
    let (infinity, nan) = (f32::INFINITY, f32::NAN);
    let rows = [[2.0, nan, 1.0], [1.0, 0.0, -infinity], [infinity, 1.0, 2.0], [nan; 3], [3.0, 1.0, 2.0]];
    let (z, len) = (on.put(rows.as_flattened())?, rows.as_flattened().len());
    let mut d = on.room(len)?;
    let correct = |on: &On<'_>, work: &mut dyn FnMut(&mut LossRecord) -> Result<()>| {
        let mut record = LossRecord::new(on.device, rows.len(), 3)?;
        record.begin(&[0; 5])?;
        work(&mut record)?;
        Ok::<_, crate::Error>(record.sum()?.correct as f32)
    };
    let hard = correct(on, &mut |record| cross_entropy(record, z.view(0..len), 0.1, None))?;
    let teacher = on.put(&vec![0.0; len])?;
    let soft = correct(on, &mut |record| {
        let target = SoftTarget { teacher: teacher.view(0..len), alpha: 0.5, temperature: 2.0 };
        distillation(record, z.view(0..len), target, Gradient { to: d.view_mut(0..len), scale: None })
    })?;
    Ok(vec![Output::float("correct", vec![hard, soft], 0)])
}

fn feature_case(on: &On<'_>) -> Result<Vec<Output>> {
    let len = 6007;
    let (student, teacher) = (on.put(&on.numbers(1, len))?, on.put(&on.numbers(2, len))?);
    let (mut d, scale) = (on.room(len)?, on.put_float(&[1024.0])?);
    let mut record = record(on, 1, 1)?;
    let gradient = Gradient { to: d.view_mut(0..len), scale: Some(scale.view(0..1)) };
    feature_mse(&mut record, student.view(0..len), teacher.view(0..len), 0.5, gradient)?;
    let loss = Output::float("loss", vec![record.sum()?.loss as f32], len);
    Ok(vec![loss, Output::rounded("gradient", on.get(&d)?, 1)])
}

/// Three steps with every kind of group; the gradients carry the loss scale.
fn optimizer_case(optimizer: Optimizer, clip_norm: f32, on: &On<'_>) -> Result<Vec<Output>> {
    let len = 1504;
    let spans = [
        ParamSpan { range: 0..700, decayed: true },
        ParamSpan { range: 704..1000, decayed: false },
        ParamSpan { range: 1008..1500, decayed: true },
    ];
    let mut state = OptimizerState::new(on.device, optimizer, spans.to_vec(), len)?;
    let mut weights = on.put_float(&super::numbers(1, len))?;
    let mut copy = match on.device {
        Device::Cpu => None,
        Device::Gpu(..) => Some(on.put(&vec![0.0; len])?),
    };
    let mut norms = Vec::new();
    for step in 0..3 {
        let scale = state.loss_scale();
        let gradient: Vec<f32> = super::numbers(10 + step, len).iter().map(|g| g * scale * 0.1).collect();
        let gradient = on.put_float(&gradient)?;
        state.begin(Update { lr: 0.1, weight_decay: 0.02, clip_norm })?;
        state.update(&mut weights, &gradient, copy.as_mut())?;
        let outcome = state.finish()?;
        norms.push(if clip_norm > 0.0 { outcome.gradient_norm.map_or(f32::NAN, |norm| norm as f32) } else { 0.0 });
    }
    let weights = on.get(&weights)?;
    let copied = match &copy {
        None => weights[1008..1500].to_vec(),
        Some(copy) => on.get(copy)?[1008..1500].to_vec(),
    };
    Ok(vec![
        Output::float("weights", weights, 16),
        Output::rounded("copy", copied, 16),
        Output::float("gradient norms", norms, len),
    ])
}
