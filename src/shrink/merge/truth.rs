//! The affine part of a network in f64, a few rows at a time: what a merged convolution is held against. Plain sums, no
//! engine, no fusion.

use std::collections::BTreeMap;

use rayon::prelude::*;

use super::product::{Rows, add_product};
use crate::graph::{Bias, Conv, ConvFamily, NodeId, NodeRange, Op, Pad};
use crate::model::Model;
use crate::shape::GemmSize;
use crate::shape::Shape;
use crate::{Error, Result};

/// Pixels that one task computes.
const PIXELS: usize = 64;

/// The unit of rounding of f32, with room for it.
pub(super) const UNIT_F32: f64 = 2.0 / (1 << 24) as f64;
/// A weight of which the [`UNIT_F32`]th part is the smallest normal f32: as much as dropping a subnormal one can change.
const DROPPED: f64 = f32::MIN_POSITIVE as f64 / UNIT_F32;

/// What is computed of an affine map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sum {
    /// Its value, Σ w·x + b.
    Signed,
    /// The size of its terms, Σ |w|·|x| + |b| along all paths: what rounding errors are relative to. A weight or a bias
    /// below the smallest normal f32 may stand for one that was dropped, and counts as [`DROPPED`].
    Magnitudes,
}

impl Sum {
    fn of(self, value: f64) -> f64 {
        if self == Self::Signed { value } else { value.abs() }
    }

    fn param(self, value: f32) -> f64 {
        match self {
            Self::Signed => f64::from(value),
            Self::Magnitudes if value.abs() < f32::MIN_POSITIVE => DROPPED,
            Self::Magnitudes => f64::from(value.abs()),
        }
    }
}

/// Images of a segment's input, `[n, h, w, c]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Images<'a> {
    pub data: &'a [f32],
    pub n: usize,
}

/// Nodes of a model that make an affine map: convolutions, batch-norms and sums.
#[derive(Debug)]
pub(super) struct Affine<'a> {
    pub model: &'a Model,
    /// Shapes of the model's values.
    pub shapes: &'a [Shape],
    /// The value the map reads.
    pub input: NodeId,
    /// Its nodes, of which the last gives its result.
    pub nodes: NodeRange,
}

/// Some rows of a value, `[n, rows, w, c]`.
struct Value {
    /// Where each row lies among those that are there.
    at: Vec<Option<usize>>,
    count: usize,
    shape: Shape,
    data: Vec<f64>,
}

impl Value {
    fn new(rows: &[usize], shape: Shape, n: usize) -> Self {
        let mut at = vec![None; shape.h];
        rows.iter().enumerate().for_each(|(place, &row)| at[row] = Some(place));
        Self { at, count: rows.len(), shape, data: vec![0.0; n * rows.len() * shape.w * shape.c] }
    }

    /// One pixel; `None` outside of the image.
    fn pixel(&self, image: usize, row: Option<usize>, col: Option<usize>) -> Option<&[f64]> {
        let (row, col) = (*self.at.get(row?)?, col.filter(|&col| col < self.shape.w)?);
        let row = image * self.count + row.expect("every row that is read was asked for");
        Some(&self.data[(row * self.shape.w + col) * self.shape.c..][..self.shape.c])
    }
}

impl Affine<'_> {
    /// Multiply-accumulates for `rows` of the result of one image.
    pub fn macs(&self, rows: &[usize]) -> u64 {
        let needed = self.needed(rows);
        let macs = |(id, rows): (&NodeId, &Vec<usize>)| match self.model.graph.nodes[*id].op {
            Op::Conv(conv) if self.nodes.contains(id) => {
                conv.macs_per_pixel() * (rows.len() * self.shapes[*id].w) as u64
            }
            _ => 0,
        };
        needed.iter().map(macs).sum()
    }

    /// How many terms lie behind one number of the result, added up over the nodes.
    pub fn terms(&self) -> f64 {
        let terms = |id: NodeId| match self.model.graph.nodes[id].op {
            Op::Conv(conv) => conv.window.taps() * conv.c_in / conv.groups + 1,
            _ => 2,
        };
        self.nodes.iter().map(terms).sum::<usize>() as f64
    }

    /// Rows of the result, `[n, rows, w, c]`.
    ///
    /// # Errors
    /// A node that is not affine.
    pub fn rows(&self, images: Images<'_>, rows: &[usize], sum: Sum) -> Result<Vec<f64>> {
        let needed = self.needed(rows);
        let mut values: BTreeMap<NodeId, Value> = BTreeMap::new();
        for (&id, rows) in &needed {
            let mut value = Value::new(rows, self.shapes[id], images.n);
            if id == self.input {
                load(&mut value, rows, images, sum);
            } else {
                self.compute(id, rows, &values, sum, &mut value)?;
            }
            values.insert(id, value);
            // What no later node reads makes room.
            values.retain(|&held, _| held == id || self.is_read_after(held, id));
        }
        let last = self.nodes.last().and_then(|last| values.remove(&last)).expect("the last node is needed");
        Ok(last.data)
    }

    fn is_read_after(&self, value: NodeId, after: NodeId) -> bool {
        NodeRange::from(after.next()..self.nodes.end)
            .iter()
            .any(|id| self.model.graph.nodes[id].inputs.contains(&value))
    }

    /// The rows of every value that some rows of the result need, in order.
    fn needed(&self, rows: &[usize]) -> BTreeMap<NodeId, Vec<usize>> {
        let mut marks: BTreeMap<NodeId, Vec<bool>> = BTreeMap::new();
        let mark = |marks: &mut BTreeMap<NodeId, Vec<bool>>, id: NodeId, row: usize| {
            let rows = marks.entry(id).or_insert_with(|| vec![false; self.shapes[id].h]);
            if let Some(mark) = rows.get_mut(row) {
                *mark = true;
            }
        };
        if let Some(last) = self.nodes.last() {
            rows.iter().for_each(|&row| mark(&mut marks, last, row));
        }
        for id in self.nodes.iter().rev() {
            let Some(own) = marks.get(&id).cloned() else { continue };
            let node = &self.model.graph.nodes[id];
            for row in (0..own.len()).filter(|&row| own[row]) {
                for &input in &node.inputs {
                    match node.op {
                        Op::Conv(Conv { window, .. }) => (0..window.k_h)
                            .filter_map(|tap| (row * window.stride_h + tap).checked_sub(window.pad.top))
                            .for_each(|row| mark(&mut marks, input, row)),
                        Op::Pad(Pad { top, .. }) => {
                            row.checked_add_signed(-top).into_iter().for_each(|row| mark(&mut marks, input, row));
                        }
                        _ => mark(&mut marks, input, row),
                    }
                }
            }
        }
        let listed = |marks: Vec<bool>| (0..marks.len()).filter(|&row| marks[row]).collect();
        marks.into_iter().map(|(id, marks)| (id, listed(marks))).collect()
    }

    fn compute(
        &self,
        id: NodeId,
        rows: &[usize],
        values: &BTreeMap<NodeId, Value>,
        sum: Sum,
        out: &mut Value,
    ) -> Result<()> {
        let node = &self.model.graph.nodes[id];
        let input = |at: usize| &values[&node.inputs[at]];
        match node.op {
            Op::Conv(conv) => self.convolve(&node.name, &conv, rows, input(0), sum, out),
            Op::BatchNorm(bn) => {
                let (factors, shifts) = self.model.batch_norm_affine(&node.name, bn);
                let affine = factors.iter().zip(&shifts).cycle();
                let lined_up = Self::lined_up(input(0), rows, out);
                let changed = lined_up.zip(affine).map(|(x, (a, b))| sum.of(*a) * x + sum.of(*b));
                out.data = changed.collect();
            }
            Op::Pad(pad) => {
                let x = input(0);
                let (w, c) = (out.shape.w, out.shape.c);
                for (at, to) in out.data.chunks_mut(c).enumerate() {
                    let (line, col) = (at / w, at % w);
                    let (image, row) = (line / rows.len(), rows[line % rows.len()]);
                    let from = [row.checked_add_signed(-pad.top), col.checked_add_signed(-pad.left)];
                    if let Some(pixel) = x.pixel(image, from[0], from[1]) {
                        to.copy_from_slice(pixel);
                    }
                }
            }
            Op::Add => {
                let both = Self::lined_up(input(0), rows, out).zip(Self::lined_up(input(1), rows, out));
                out.data = both.map(|(a, b)| a + b).collect();
            }
            _ => return Err(Error::Merge(format!("{} is not affine and cannot be checked", node.name))),
        }
        Ok(())
    }

    /// The numbers of a value of the same shape that lie where those of `out` lie.
    fn lined_up<'v>(value: &'v Value, rows: &'v [usize], out: &Value) -> impl Iterator<Item = f64> + use<'v> {
        let row = value.shape.w * value.shape.c;
        let n = out.data.len() / (rows.len() * row).max(1);
        (0..n).flat_map(move |image| rows.iter().map(move |&row| (image, row))).flat_map(move |(image, of)| {
            let place = image * value.count + value.at[of].expect("every row that is read was asked for");
            value.data[place * row..][..row].iter().copied()
        })
    }

    fn convolve(&self, name: &str, conv: &Conv, rows: &[usize], x: &Value, sum: Sum, out: &mut Value) {
        let weight = &self.model.weight(&format!("{name}.weight")).data;
        let (w_out, window, c_out) = (out.shape.w, conv.window, conv.c_out);
        self.set_bias(name, conv, rows, sum, out);
        let (group_in, group_out) = (conv.c_in / conv.groups, c_out / conv.groups);
        let is_depthwise = conv.family() == ConvFamily::Depthwise;
        for tap in 0..window.taps() {
            let (tap_row, tap_col) = (tap / window.k_w, tap % window.k_w);
            // The tap's weights `[groups, group_in, group_out]`.
            let mut weights = vec![0.0; conv.c_in * group_out];
            weights.par_chunks_mut(group_out).with_min_len(PIXELS).enumerate().for_each(|(channel, line)| {
                let (group, m) = (channel / group_in, channel % group_in);
                let (first, step) = if is_depthwise {
                    (tap * c_out + group, 1)
                } else {
                    ((group * group_out * window.taps() + tap) * group_in + m, window.taps() * group_in)
                };
                let from = weight[first..].iter().step_by(step);
                line.iter_mut().zip(from).for_each(|(to, &w)| *to = sum.param(w));
            });
            out.data.par_chunks_mut(PIXELS * c_out).enumerate().for_each(|(chunk, out)| {
                let pixels = out.len() / c_out;
                let mut read = vec![0.0; pixels * conv.c_in];
                for (pixel, read) in read.chunks_mut(conv.c_in).enumerate() {
                    let at = chunk * PIXELS + pixel;
                    let (line, col) = (at / w_out, at % w_out);
                    let (image, row) = (line / rows.len(), rows[line % rows.len()]);
                    let row = (row * window.stride_h + tap_row).checked_sub(window.pad.top);
                    let col = (col * window.stride_w + tap_col).checked_sub(window.pad.left);
                    if let Some(pixel) = x.pixel(image, row, col) {
                        read.copy_from_slice(pixel);
                    }
                }
                if is_depthwise {
                    let products = read.iter().zip(weights.iter().cycle());
                    out.iter_mut().zip(products).for_each(|(out, (x, w))| *out += x * w);
                    return;
                }
                for group in 0..conv.groups {
                    let a = Rows { data: &read[group * group_in..], stride: conv.c_in };
                    let b = Rows { data: &weights[group * group_in * group_out..], stride: group_out };
                    add_product(
                        GemmSize { m: pixels, n: group_out, k: group_in },
                        a,
                        b,
                        &mut out[group * group_out..],
                        c_out,
                    );
                }
            });
        }
    }

    /// Fills the result of a convolution with its bias.
    fn set_bias(&self, name: &str, conv: &Conv, rows: &[usize], sum: Sum, out: &mut Value) {
        let row = out.shape.w * conv.c_out;
        match conv.bias {
            Bias::None => {}
            Bias::Channel => {
                let bias = &self.model.weight(&format!("{name}.bias")).data;
                out.data.iter_mut().zip(bias.iter().cycle()).for_each(|(out, &b)| *out = sum.param(b));
            }
            Bias::Map => {
                let bias = &self.model.weight(&format!("{name}.bias_map")).data;
                for (line, &of) in out.data.chunks_mut(row).zip(rows.iter().cycle()) {
                    line.iter_mut().zip(&bias[of * row..]).for_each(|(out, &b)| *out = sum.param(b));
                }
            }
        }
    }
}

fn load(value: &mut Value, rows: &[usize], images: Images<'_>, sum: Sum) {
    let row = value.shape.w * value.shape.c;
    let lines = (0..images.n).flat_map(|image| rows.iter().map(move |&row| (image, row)));
    for (line, (image, of)) in value.data.chunks_mut(row).zip(lines) {
        let from = &images.data[image * value.shape.len() + of * row..][..row];
        line.iter_mut().zip(from).for_each(|(to, &x)| *to = sum.of(f64::from(x)));
    }
}
