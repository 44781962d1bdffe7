//! Where the zero padding of a linear segment sits, which decides how its border can be merged exactly
//! (`docs/methods.md` 1.4, "the border problem").

use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::graph::{Conv, Graph, Node, NodeId, Op, Pad, Segment, read_padding};
use crate::shape::{Padding, Shape, Window};
use crate::{Error, Result};

/// How the border of a merged segment is made exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PaddingMode {
    /// R1: before finetuning all padding moves to the segment's first convolution. Changes the function at the border,
    /// then every chain merges into a convolution with a plain bias.
    Reorder,
    /// R3: the padding stays where it was trained and the merged convolution gets a bias per position. Needs no
    /// finetuning; for segments where only 1×1 convolutions come before the padded one.
    BorderBias,
}

impl fmt::Display for PaddingMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Reorder => "reorder",
            Self::BorderBias => "border-bias",
        })
    }
}

impl FromStr for PaddingMode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        match text {
            "reorder" => Ok(Self::Reorder),
            "border-bias" => Ok(Self::BorderBias),
            _ => Err(Error::Config(format!("unknown padding {text:?}; use reorder or border-bias"))),
        }
    }
}

/// What moves the padding of segments to their front (R1), by names, so that it can be done in any graph of the same nodes.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Reordering {
    /// The padding of the convolutions that get another one.
    pub windows: BTreeMap<String, Padding>,
    /// What is padded or cut before a node reads its input of an index.
    pub pads: BTreeMap<(String, usize), Pad>,
}

impl Reordering {
    /// Whether nothing moves.
    pub fn is_empty(&self) -> bool {
        self.windows.is_empty() && self.pads.is_empty()
    }

    /// What moves the padding of all of some segments, which do not overlap.
    ///
    /// # Errors
    /// As [`reordered`].
    pub fn of_all(graph: &Graph, segments: &[Segment]) -> Result<Self> {
        let (shapes, mut all) = (graph.shapes()?, Self::default());
        for segment in segments {
            let Self { windows, pads } = reordered(graph, &shapes, segment)?;
            all.windows.extend(windows);
            all.pads.extend(pads);
        }
        Ok(all)
    }

    /// The graph with it done.
    ///
    /// # Errors
    /// A graph of other nodes.
    pub fn applied(&self, graph: &Graph) -> Result<Graph> {
        if self.is_empty() {
            return Ok(graph.clone());
        }
        graph.rewrite(|_, node, out| {
            let mut inputs: Vec<NodeId> = node.inputs.iter().map(|&input| out.value(input)).collect();
            for (at, input) in inputs.iter_mut().enumerate() {
                if let Some(&pad) = self.pads.get(&(node.name.clone(), at)) {
                    let name = format!("{}.pad{at}", node.name);
                    *input = out.push(Node { name, inputs: vec![*input], op: Op::Pad(pad) });
                }
            }
            let op = match (node.op, self.windows.get(&node.name)) {
                (Op::Conv(conv), Some(&pad)) => Op::Conv(Conv { window: Window { pad, ..conv.window }, ..conv }),
                (op, _) => op,
            };
            Ok(out.push(Node { name: node.name.clone(), inputs, op }))
        })
    }
}

/// The rows and columns of a value that are needed, counted from the corner that it has while it is padded where it was:
/// `[first, behind the last]`, first rows, then columns.
type Extent = [[isize; 2]; 2];

fn extent(shape: Shape) -> Extent {
    [[0, shape.h as isize], [0, shape.w as isize]]
}

/// What holds both.
fn hull(a: Extent, b: Extent) -> Extent {
    [0, 1].map(|i| [a[i][0].min(b[i][0]), a[i][1].max(b[i][1])])
}

/// What a convolution reads to give an extent, as it is padded in the network.
fn read_by(window: Window, [rows, cols]: Extent) -> Extent {
    let axis = |[first, end]: [isize; 2], k: usize, stride: usize, before: usize| {
        let (k, stride, before) = (k as isize, stride as isize, before as isize);
        [first * stride - before, (end - 1) * stride - before + k]
    };
    [axis(rows, window.k_h, window.stride_h, window.pad.top), axis(cols, window.k_w, window.stride_w, window.pad.left)]
}

/// What is added to an extent so that it becomes another one; negative amounts cut off.
fn between(has: Extent, needs: Extent) -> Pad {
    let [before, behind] = [0, 1].map(|end| [0, 1].map(|i| (has[i][end] - needs[i][end]) * [1, -1][end]));
    Pad { top: before[0], left: before[1], bottom: behind[0], right: behind[1] }
}

/// R1: all padding of a segment goes to its front, so that no value within it is padded. Every value is then had for so many
/// more rows and columns as what follows would have padded: the convolutions that read the segment's input pad it by that
/// much, and a shortcut is cut, or padded at the segment's input, to the size of what it is added to. What a sum gives beyond
/// the border is what the merged convolution gives there. Nothing moves where no convolution pads a value from within.
///
/// # Errors
/// A segment with anything but convolutions, batch-norms, sums and activations.
pub fn reordered(graph: &Graph, shapes: &[Shape], segment: &Segment) -> Result<Reordering> {
    let pads = |id: NodeId| match graph.nodes[id].op {
        Op::Conv(conv) => {
            let x = graph.nodes[id].inputs[0];
            x != segment.input && read_padding(conv.window, shapes[x], shapes[id]) != Padding::ZERO
        }
        _ => false,
    };
    let mut moved = Reordering::default();
    if !segment.nodes.iter().any(pads) {
        return Ok(moved);
    }
    let needs = needs(graph, shapes, segment)?;
    for id in segment.nodes.iter().filter(|id| needs.contains_key(id)) {
        let node = &graph.nodes[id];
        for (at, &input) in node.inputs.iter().enumerate() {
            let (has, wanted) = (needs[&input], input_need(&node.op, needs[&id]));
            if let Op::Conv(Conv { window, .. }) = node.op {
                let pad = if input == segment.input { front(has, wanted) } else { Padding::ZERO };
                if window.pad != pad {
                    moved.windows.insert(node.name.clone(), pad);
                }
                // Rows that a stride leaves unread may stay.
                let cut = between(has, wanted);
                if input == segment.input || (cut.top, cut.left) == (0, 0) && fits(window, has, needs[&id]) {
                    continue;
                }
            }
            let pad = between(has, wanted);
            if pad != (Pad { top: 0, left: 0, bottom: 0, right: 0 }) {
                moved.pads.insert((node.name.clone(), at), pad);
            }
        }
    }
    Ok(moved)
}

/// The extent of every value of a segment, its input's included, that what follows reads; never less than the value has.
fn needs(graph: &Graph, shapes: &[Shape], segment: &Segment) -> Result<BTreeMap<NodeId, Extent>> {
    let mut needs = BTreeMap::from([(segment.output(), extent(shapes[segment.output()]))]);
    for id in segment.nodes.iter().rev() {
        let Some(&own) = needs.get(&id) else { continue };
        let node = &graph.nodes[id];
        if !matches!(node.op, Op::Conv(_) | Op::BatchNorm(_) | Op::Add | Op::Activation(_)) {
            let what = graph.describe_segment(segment);
            return Err(Error::Merge(format!(
                "{what}: padding cannot move over {}; use --padding border-bias or keep this block",
                node.name
            )));
        }
        let wanted = input_need(&node.op, own);
        for &input in node.inputs.iter().filter(|&&input| input != segment.input) {
            let known = needs.entry(input).or_insert_with(|| extent(shapes[input]));
            *known = hull(*known, wanted);
        }
    }
    needs.insert(segment.input, extent(shapes[segment.input]));
    Ok(needs)
}

fn input_need(op: &Op, own: Extent) -> Extent {
    if let Op::Conv(conv) = op { read_by(conv.window, own) } else { own }
}

/// Padding of what a convolution reads at the front; rows that it leaves unread need none.
fn front(has: Extent, wanted: Extent) -> Padding {
    let Pad { top, left, bottom, right } = between(has, wanted);
    let [top, left, bottom, right] = [top, left, bottom, right].map(|amount| amount.max(0) as usize);
    Padding { top, left, bottom, right }
}

/// Whether a convolution without padding makes an extent of another one.
fn fits(window: Window, from: Extent, to: Extent) -> bool {
    let size = |[first, end]: [isize; 2]| (end - first) as usize;
    let unpadded = Window { pad: Padding::ZERO, ..window };
    unpadded.output(size(from[0]), size(from[1])) == Some((size(to[0]), size(to[1])))
}
