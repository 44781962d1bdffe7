//! The network as a column of blocks: what each was and what it became.

use std::fmt::Write as _;

use super::plot::{legend, open, text};
use crate::Result;
use crate::graph::{ConvFamily, Counterpart, Graph, NodeId, NodeRange, Op};

const WIDTH: f64 = 560.0;
const ROW: f64 = 40.0;
const BOX_HEIGHT: f64 = 24.0;
const GAP: f64 = 14.0;
/// Where the columns start: resolution, original layers, layers that run now.
const SHAPE_X: f64 = 62.0;
const BEFORE_X: f64 = 150.0;
const AFTER_X: f64 = 372.0;
const HEADER: f64 = 26.0;

/// A layer as drawn: its kind and size, and whether an activation follows.
struct Layer {
    label: String,
    activated: bool,
}

/// Draws the blocks of `before` beside what they are in `after`, top to bottom; `map` as [`Graph::counterparts`] takes it.
/// Blocks that one merged segment holds share a row. `kept` has one flag per block.
///
/// # Errors
/// As [`Graph::shapes`] and [`Graph::counterparts`].
pub(super) fn network_drawing(before: &Graph, after: &Graph, map: &[Option<NodeId>], kept: &[bool]) -> Result<String> {
    let shapes = before.shapes()?;
    let parts = before.counterparts(after, map)?;
    let rows = parts.len() + 2;
    let mut svg = open("The network before and after", WIDTH, HEADER + ROW * rows as f64);
    for (x, name) in [(8.0, "block"), (SHAPE_X, "output"), (BEFORE_X, "original"), (AFTER_X, "now")] {
        text(&mut svg, "tick", (x, 15.0), "start", name);
    }
    let end = before.output().next();
    let stem_end = parts.first().map_or(end, |part| part.before.nodes.start);
    let head_start = parts.last().map_or(end, |part| part.before.nodes.end);
    draw_plain(&mut svg, 0, "stem", before, (NodeId::INPUT.next()..stem_end).into(), &shapes);
    for (index, part) in parts.iter().enumerate() {
        let y = HEADER + ROW * (index + 1) as f64;
        let class = class(after, part, kept);
        let names: Vec<&str> = part.blocks.clone().map(|b| short_name(&before.blocks[b].name)).collect();
        label_row(&mut svg, y, &names.join("+"), class, &shapes[part.before.output()].to_string());
        let was = part.before.nodes;
        draw_layers(&mut svg, (BEFORE_X, y), &layers(before, was, true), "c-plain", has_skip(before, was));
        let (is, sized) = (part.after.nodes, class != "c-kept");
        draw_layers(&mut svg, (AFTER_X, y), &layers(after, is, sized), class, has_skip(after, is));
    }
    draw_plain(&mut svg, rows - 1, "head", before, (head_start..end).into(), &shapes);
    svg.push_str("</svg>");
    let entries =
        [("c-kept", "kept, activations in place"), ("c-linear", "linear, not merged"), ("c-merged", "merged")];
    Ok(format!("{}<div class=\"scroll narrow\">{svg}</div>", legend(entries.into_iter())))
}

/// The class, and thus the colour, of a part: kept, linear or merged. Blocks that still have activations count as kept
/// unless the mask frees them.
fn class(after: &Graph, part: &Counterpart, kept: &[bool]) -> &'static str {
    let nodes = &after.nodes[part.after.nodes];
    let is_active = nodes.iter().any(|node| node.site().is_some());
    let convs = nodes.iter().filter(|node| matches!(node.op, Op::Conv(_))).count();
    match () {
        () if !is_active && convs == 1 && !nodes.iter().any(|n| matches!(n.op, Op::BatchNorm(_) | Op::Add)) => {
            "c-merged"
        }
        () if is_active && part.blocks.clone().all(|b| kept.get(b).copied().unwrap_or(true)) => "c-kept",
        () => "c-linear",
    }
}

fn has_skip(graph: &Graph, nodes: NodeRange) -> bool {
    nodes.iter().any(|id| matches!(graph.nodes[id].op, Op::Add))
}

/// The block's place in the network without the prefix all of them share.
pub(super) fn short_name(name: &str) -> &str {
    name.strip_prefix("blocks.").unwrap_or(name)
}

fn draw_plain(
    svg: &mut String,
    row: usize,
    name: &str,
    graph: &Graph,
    nodes: NodeRange,
    shapes: &[crate::shape::Shape],
) {
    let y = HEADER + ROW * row as f64;
    let conv = nodes.iter().rfind(|&id| matches!(graph.nodes[id].op, Op::Conv(_)));
    let shape = conv.map(|id| shapes[id].to_string()).unwrap_or_default();
    label_row(svg, y, name, "muted", &shape);
    draw_layers(svg, (BEFORE_X, y), &layers(graph, nodes, true), "c-plain", false);
}

fn label_row(svg: &mut String, y: f64, name: &str, class: &str, shape: &str) {
    text(svg, &format!("row-name {class}"), (8.0, y + 17.0), "start", name);
    text(svg, "tick", (SHAPE_X, y + 17.0), "start", shape);
}

/// The convolutions and linear layers of a run of nodes; short labels leave the sizes out.
fn layers(graph: &Graph, nodes: NodeRange, sized: bool) -> Vec<Layer> {
    let mut layers: Vec<Layer> = Vec::new();
    for id in nodes.iter() {
        match graph.nodes[id].op {
            Op::Conv(conv) => {
                let (k_h, k_w) = (conv.window.k_h, conv.window.k_w);
                let stride = conv.window.stride_h.max(conv.window.stride_w);
                let stride = if stride > 1 { format!(" /{stride}") } else { String::new() };
                let label = match conv.family() {
                    ConvFamily::Depthwise => format!("dw {k_h}×{k_w}{stride}"),
                    ConvFamily::Pointwise if sized => format!("{}→{}", conv.c_in, conv.c_out),
                    ConvFamily::Pointwise => "1×1".to_owned(),
                    ConvFamily::Dense => format!("{k_h}×{k_w}{stride}  {}→{}", conv.c_in, conv.c_out),
                };
                layers.push(Layer { label, activated: false });
            }
            Op::Linear(linear) => {
                layers.push(Layer { label: format!("{}→{}", linear.c_in, linear.c_out), activated: false });
            }
            Op::Activation(activation) if activation.slope < 1.0 => {
                if let Some(last) = layers.last_mut() {
                    last.activated = true;
                }
            }
            _ => {}
        }
    }
    layers
}

/// Boxes from left to right joined by lines; a filled dot behind a box is an activation, an arc above is the residual.
fn draw_layers(svg: &mut String, (x, y): (f64, f64), layers: &[Layer], class: &str, skip: bool) {
    let (mut at, middle) = (x, y + BOX_HEIGHT / 2.0);
    for (i, layer) in layers.iter().enumerate() {
        // Labels are set in a fixed-width font of about 6.3 units a letter.
        let width = layer.label.chars().count() as f64 * 6.3 + 10.0;
        let _ = write!(
            svg,
            "<rect class=\"box {class}\" x=\"{at:.1}\" y=\"{y}\" width=\"{width:.1}\" height=\"{BOX_HEIGHT}\" rx=\"4\"/>"
        );
        text(svg, "layer", (at + width / 2.0, y + 16.0), "middle", &layer.label);
        let (from, to) = (at + width, at + width + GAP);
        if i + 1 < layers.len() {
            let _ =
                write!(svg, "<line class=\"wire\" x1=\"{from:.1}\" y1=\"{middle}\" x2=\"{to:.1}\" y2=\"{middle}\"/>");
        }
        if layer.activated {
            let cx = (from + to) / 2.0;
            let circle = format!("<circle class=\"act\" cx=\"{cx:.1}\" cy=\"{middle}\" r=\"3.6\">");
            let _ = write!(svg, "{circle}<title>activation</title></circle>");
        }
        at = to;
    }
    if skip && !layers.is_empty() {
        let (from, to, top) = (x + 6.0, at - GAP - 6.0, y - 7.0);
        let _ =
            write!(svg, "<path class=\"skip\" d=\"M{from:.1} {y}V{top}H{to:.1}V{y}\"><title>residual</title></path>");
    }
}
