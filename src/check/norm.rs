//! The fused step and batch-norm alone.

use super::{Case, On, Output};
use crate::Result;
use crate::device::Buffer;
use crate::ops::activation::Clamp;
use crate::ops::batch_norm::{self, BackwardInputs, BatchNormProblem, BatchNormState, Tail};
use crate::ops::conv::{Bias, Conv, ConvProblem};
use crate::ops::conv_bn;
use crate::ops::conv_input::ConvInput;
use crate::shape::{Shape, Window};

/// lines, w, c, whether a residual follows, limit and slope of an activation.
pub type NormRow = (usize, usize, usize, bool, Option<(f32, f32)>);

/// With and without residual and activation; a slope of 1 and of 0; one pixel per line; many channels and few.
pub const NORMS: &[NormRow] = &[
    (6, 5, 8, false, None),
    (7, 9, 24, false, Some((1.0, 0.0))),
    (130, 28, 16, false, Some((6.0, 0.0))),
    (4, 3, 5, true, None),
    (12, 4, 13, true, Some((0.8, 0.0))),
    (9, 7, 40, true, Some((1.2, 0.3))),
    (8, 2, 1280, false, Some((1.0, 1.0))),
    (3, 1, 3, false, Some((f32::INFINITY, 0.0))),
];

pub(super) fn cases(row: &NormRow) -> Vec<Case> {
    let row = *row;
    let name = format!("{}x{}x{}_residual_{}_{:?}", row.0, row.1, row.2, row.3, row.4);
    vec![
        Case::new(format!("conv_bn/{name}"), move |on| fused(row, on)),
        Case::new(format!("batch_norm/{name}"), move |on| alone(row, on)),
    ]
}

/// What a batch-norm needs besides its activations.
struct Parameters {
    gamma: Buffer,
    beta: Buffer,
    running: Buffer,
    saved: Buffer,
}

impl Parameters {
    fn new(c: usize, on: &On<'_>) -> Result<Self> {
        let gamma: Vec<f32> = super::numbers(14, c).iter().map(|v| 1.0 + 0.3 * v).collect();
        Ok(Self {
            gamma: on.put_float(&gamma)?,
            beta: on.put_float(&super::numbers(15, c))?,
            running: on.put_float(&[vec![0.5; c], vec![2.0; c]].concat())?,
            saved: on.float_room(2 * c)?,
        })
    }

    fn state(&mut self) -> BatchNormState<'_> {
        let c = self.gamma.len();
        BatchNormState {
            gamma: self.gamma.view(0..c),
            beta: self.beta.view(0..c),
            running: self.running.view_mut_disjoint([0..c, c..2 * c]),
            saved: self.saved.view_mut(0..2 * c),
        }
    }
}

/// A mean far from zero, where naive variances lose their digits.
fn activations(c: usize, len: usize, on: &On<'_>) -> Vec<f32> {
    on.round(super::numbers(11, len).iter().enumerate().map(|(i, v)| v + (i % c % 5) as f32 * 3.0).collect())
}

/// Behind an identity-like pointwise convolution, so that the whole step runs.
fn fused((lines, w, c, with_residual, act): NormRow, on: &On<'_>) -> Result<Vec<Output>> {
    let len = lines * w * c;
    let p = BatchNormProblem { lines, w, c, eps: 1e-5, momentum: 0.1 };
    let conv = Conv { c_in: c, c_out: c, window: Window::square(1, 1, 0), groups: 1, bias: Bias::None };
    let conv = ConvProblem::new(&conv, Shape::new(lines, w, c), 1).expect("a pointwise kernel fits");
    let mut identity = vec![0.0; c * c];
    (0..c).for_each(|i| identity[i * c + i] = 1.0);
    let (x, identity) = (on.put(&activations(c, len, on))?, on.put(&identity)?);
    let (residual, dz) = (on.put(&on.numbers(13, len))?, on.put(&on.numbers(12, len))?);
    let mut parameters = Parameters::new(c, on)?;
    let (mut raw, mut z) = (on.room(len)?, on.room(len)?);
    let clamp = act.map(|(limit, slope)| Clamp::new(Some(limit), slope));
    let tail = Tail { residual: with_residual.then(|| residual.view(0..len)), clamp };
    let operands = (ConvInput::Stored(x.view(0..len)), identity.view(0..c * c));
    let out = Some((tail, z.view_mut(0..len)));
    conv_bn::forward((&conv, &p), operands, parameters.state(), raw.view_mut(0..len), out);
    let inputs = BackwardInputs {
        y: raw.view(0..len),
        dz: dz.view(0..len),
        gamma: parameters.gamma.view(0..c),
        beta: parameters.beta.view(0..c),
        saved: parameters.saved.view(0..2 * c),
        tail,
    };
    let (mut dx, mut dy, mut dw) = (on.room(len)?, on.room(len)?, on.float_room(c * c)?);
    // Added to ones, to see accumulation.
    let mut d_residual = on.put(&vec![1.0; len])?;
    let (mut d_bn, mut score) = (on.float_room(2 * c)?, on.put_float(&[0.25])?);
    let out = conv_bn::Gradients {
        dx: Some((dx.view_mut(0..len), false)),
        d_residual: with_residual.then(|| (d_residual.view_mut(0..len), true)),
        dw: dw.view_mut(0..c * c),
        d_bn: d_bn.view_mut_disjoint([0..c, c..2 * c]),
    };
    let (score_view, dy_view) = (score.view_mut(0..1), dy.view_mut(0..len));
    conv_bn::backward((&conv, &p), operands, inputs, None, out, clamp.map(|_| score_view), Some(dy_view));
    let pixels = lines * w;
    Ok(vec![
        Output::rounded("z", on.get(&z)?, pixels),
        Output::float("statistics", on.get(&parameters.saved)?, pixels),
        Output::float("running statistics", on.get(&parameters.running)?, pixels),
        Output::rounded("dx", on.get(&dx)?, pixels),
        Output::rounded("residual's gradient", on.get(&d_residual)?, 1),
        // Products of the rounded dy with x, whose mean is large while that of dy is 0.
        Output::derived("dw", on.get(&dw)?, 100 * pixels, 8.0 * (pixels as f64).sqrt()),
        Output::float("dγ and dβ", on.get(&d_bn)?, pixels),
        Output::float("score", on.get(&score)?, len),
    ])
}

fn alone((lines, w, c, _, act): NormRow, on: &On<'_>) -> Result<Vec<Output>> {
    let len = lines * w * c;
    let p = BatchNormProblem { lines, w, c, eps: 1e-5, momentum: 0.1 };
    let (y, dz) = (on.put(&activations(c, len, on))?, on.put(&on.numbers(12, len))?);
    let mut parameters = Parameters::new(c, on)?;
    let (mut z, mut inferred) = (on.room(len)?, on.room(len)?);
    batch_norm::forward(&p, y.view(0..len), parameters.state(), Tail::NONE, z.view_mut(0..len));
    let running = [parameters.running.view(0..c), parameters.running.view(c..2 * c)];
    let read = [parameters.gamma.view(0..c), parameters.beta.view(0..c), running[0], running[1]];
    let tail = Tail { residual: None, clamp: act.map(|(limit, slope)| Clamp::new(Some(limit), slope)) };
    batch_norm::forward_inference(&p, y.view(0..len), read, tail, inferred.view_mut(0..len));
    let inputs = BackwardInputs {
        y: y.view(0..len),
        dz: dz.view(0..len),
        gamma: parameters.gamma.view(0..c),
        beta: parameters.beta.view(0..c),
        saved: parameters.saved.view(0..2 * c),
        tail: Tail::NONE,
    };
    let (mut dy, mut d_bn) = (on.put(&vec![1.0; len])?, on.float_room(2 * c)?);
    let d_params = d_bn.view_mut_disjoint([0..c, c..2 * c]);
    batch_norm::backward(&p, inputs, (dy.view_mut(0..len), true), d_params);
    let pixels = lines * w;
    Ok(vec![
        Output::rounded("z", on.get(&z)?, pixels),
        Output::rounded("z at inference", on.get(&inferred)?, pixels),
        Output::rounded("dy", on.get(&dy)?, pixels),
        Output::float("dγ and dβ", on.get(&d_bn)?, pixels),
    ])
}
