//! Convolutions of every family, kernel, stride, padding and tile.

use super::{Case, On, Output};
use crate::Result;
use crate::ops::activation::Clamp;
use crate::ops::conv::{self, Bias, Conv, ConvBias, ConvProblem};
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

/// Multiply-accumulates of a row from which on it is there for its tiles alone: what else there is to a convolution does
/// not depend on them, and smaller rows see to it.
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

fn name(p: &ConvProblem) -> String {
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
        case("finish", |p, on| forward(p, on, Some(Bias::Channel), Some(Clamp::new(Some(1.5), 0.25)))),
        case("gradient", |p, on| backward(p, on, Bias::Channel, None)),
    ];
    if p.macs() <= MANY_MACS {
        cases.extend([
            case("forward", |p, on| forward(p, on, None, None)),
            case("bias_map", |p, on| forward(p, on, Some(Bias::Map), Some(Clamp::new(Some(6.0), 0.0)))),
            case("add", |p, on| backward(p, on, Bias::Map, Some(0.5))),
        ]);
    }
    cases
}

fn terms(p: &ConvProblem) -> usize {
    p.weight_len() / p.output.c
}

fn forward(p: &ConvProblem, on: &On<'_>, bias: Option<Bias>, clamp: Option<Clamp>) -> Result<Vec<Output>> {
    let len = p.n * p.output.len();
    let x = on.put(&on.numbers(1, p.n * p.input.len()))?;
    let w = on.put(&on.numbers(2, p.weight_len()))?;
    let map = on.put_float(&numbers_for(bias, p))?;
    let residual = on.put(&on.numbers(5, len))?;
    let mut y = on.room(len)?;
    let bias = match bias {
        None => ConvBias::None,
        Some(Bias::Map) => ConvBias::Map(map.view(0..map.len())),
        Some(_) => ConvBias::Channel(map.view(0..map.len())),
    };
    let residual = clamp.map(|_| residual.view(0..len));
    let operands = (x.view(0..x.len()), w.view(0..w.len()));
    conv::forward(p, operands, bias, residual, clamp, y.view_mut(0..len));
    Ok(vec![Output::rounded("y", on.get(&y)?, terms(p))])
}

fn numbers_for(bias: Option<Bias>, p: &ConvProblem) -> Vec<f32> {
    super::numbers(4, if bias == Some(Bias::Map) { p.output.len() } else { p.output.c })
}

fn backward(p: &ConvProblem, on: &On<'_>, bias: Bias, seed: Option<f32>) -> Result<Vec<Output>> {
    let (len_in, len) = (p.n * p.input.len(), p.n * p.output.len());
    let x = on.put(&on.numbers(1, len_in))?;
    let w = on.put(&on.numbers(2, p.weight_len()))?;
    let dy = on.put(&on.numbers(3, len))?;
    let mut dx = on.put(&vec![seed.unwrap_or(f32::NAN); len_in])?;
    let (mut dw, mut db) = (on.float_room(p.weight_len())?, on.float_room(numbers_for(Some(bias), p).len())?);
    let read = (x.view(0..len_in), w.view(0..w.len()), dy.view(0..len));
    let (dw_len, db_len) = (dw.len(), db.len());
    let into = Some((dx.view_mut(0..len_in), seed.is_some()));
    conv::backward(p, read, into, dw.view_mut(0..dw_len), Some(db.view_mut(0..db_len)));
    let pixels = p.n * p.output.pixels();
    Ok(vec![
        Output::rounded("dx", on.get(&dx)?, terms(p) * p.output.c / p.input.c.max(1) + 1),
        Output::float("dw", on.get(&dw)?, pixels),
        Output::float("db", on.get(&db)?, pixels),
    ])
}
