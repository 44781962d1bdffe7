//! Planning which values share memory: every value lives from the step that writes it to the last that reads it.

use crate::Result;
use crate::device::{Buffer, Device};
use crate::graph::NodeId;

use super::plan::{Plan, StepKind};

/// Index of a buffer that several values use one after the other.
pub(super) type Slot = usize;

/// Where each value and gradient lies.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// Slot of a node's value; `None` for values inside a fused step or formed on load.
    pub value: Vec<Option<Slot>>,
    /// Slot of a node's gradient.
    pub gradient: Vec<Option<Slot>>,
    /// Slot of a fused training step's convolution result, by step.
    pub raw: Vec<Option<Slot>>,
    /// Elements per image of every slot.
    pub sizes: Vec<usize>,
    /// Elements per image of the gradient of a convolution's result, for devices that store it.
    pub dy: usize,
}

/// The buffers of one pass.
#[derive(Debug, Default)]
pub(super) struct Memory {
    pub slots: Vec<Buffer>,
    /// Gradient of a convolution's result on its way through the fused backward pass.
    pub dy: Buffer,
}

impl Memory {
    pub fn new(device: &Device, layout: &Layout, batch: usize) -> Result<Self> {
        let slots = layout.sizes.iter().map(|len| device.activations(len * batch)).collect::<Result<_>>()?;
        let dy = match device {
            Device::Cpu => Buffer::default(),
            Device::Gpu(..) => device.activations(layout.dy * batch)?,
        };
        Ok(Self { slots, dy })
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        self.slots.iter().chain([&self.dy]).map(Buffer::bytes).sum()
    }

    /// Takes a buffer out, so that it can be written while others are read.
    pub fn take(&mut self, slot: Slot) -> Buffer {
        std::mem::take(&mut self.slots[slot])
    }
}

/// Something that needs memory from one time to another.
struct Item {
    len: usize,
    from: usize,
    to: usize,
    target: Target,
}

#[derive(Clone, Copy)]
enum Target {
    Value(NodeId),
    Gradient(NodeId),
    Raw(usize),
}

impl Layout {
    /// Plans memory. Time runs 0 for the input, i + 1 for step i, then the loss, then the steps backwards.
    pub fn new(plan: &Plan, taps: &[NodeId]) -> Self {
        let count = plan.steps.len();
        let (loss, nodes) = (count + 1, plan.shapes.len());
        let backward = |step: usize| 2 * count + 1 - step;
        let output = nodes - 1;
        // When each value is written and last read, and when its gradient is first written.
        let (mut from, mut to, mut gradient_from) = (vec![None; nodes], vec![0; nodes], vec![usize::MAX; nodes]);
        from[0] = Some(0);
        for &node in taps.iter().chain([&output]) {
            to[node] = loss;
            gradient_from[node] = loss;
        }
        let (mut items, mut dy) = (Vec::new(), 0);
        for (index, step) in plan.steps.iter().enumerate() {
            from[step.output] = Some(index + 1);
            for (position, &input) in step.inputs.iter().enumerate() {
                to[input] = to[input].max(index + 1);
                gradient_from[input] = gradient_from[input].min(backward(index));
                if plan.training && saves(&step.kind, position) {
                    to[input] = to[input].max(backward(index));
                }
            }
            if plan.training && matches!(step.kind, StepKind::ConvBatchNorm { .. }) {
                let len = plan.shapes[step.output].len();
                items.push(Item { len, from: index + 1, to: backward(index), target: Target::Raw(index) });
                dy = dy.max(len);
            }
        }
        let writer: std::collections::HashMap<NodeId, usize> =
            plan.steps.iter().enumerate().map(|(i, s)| (s.output, i)).collect();
        for node in 0..nodes {
            let Some(from) = from[node] else { continue };
            let len = plan.shapes[node].len();
            if writer.get(&node).is_none_or(|&step| plan.steps[step].stored) {
                items.push(Item { len, from, to: to[node].max(from), target: Target::Value(node) });
            }
            if let Some(&step) = writer.get(&node)
                && plan.training
                && gradient_from[node] != usize::MAX
            {
                let (from, to) = (gradient_from[node], backward(step));
                items.push(Item { len, from, to, target: Target::Gradient(node) });
            }
        }
        Self { dy, ..Self::assign(items, nodes, count) }
    }

    /// Gives every item the free slot that fits best.
    fn assign(mut items: Vec<Item>, nodes: usize, steps: usize) -> Self {
        let mut layout = Self {
            value: vec![None; nodes],
            gradient: vec![None; nodes],
            raw: vec![None; steps],
            sizes: Vec::new(),
            dy: 0,
        };
        items.sort_by_key(|item| (item.from, std::cmp::Reverse(item.len)));
        let mut busy_until: Vec<usize> = Vec::new();
        for item in items {
            let free = (0..layout.sizes.len()).filter(|&slot| busy_until[slot] < item.from);
            // The smallest that is large enough, else the largest, which then grows.
            let fit = |slot: &usize| {
                let size = layout.sizes[*slot];
                if size >= item.len { (0, size) } else { (1, usize::MAX - size) }
            };
            let slot = free.min_by_key(fit).unwrap_or_else(|| {
                layout.sizes.push(0);
                busy_until.push(0);
                layout.sizes.len() - 1
            });
            layout.sizes[slot] = layout.sizes[slot].max(item.len);
            busy_until[slot] = item.to;
            match item.target {
                Target::Value(node) => layout.value[node] = Some(slot),
                Target::Gradient(node) => layout.gradient[node] = Some(slot),
                Target::Raw(step) => layout.raw[step] = Some(slot),
            }
        }
        layout
    }
}

/// Whether the backward pass of a step reads its input at a position.
fn saves(kind: &StepKind, position: usize) -> bool {
    match kind {
        StepKind::Conv { .. }
        | StepKind::BatchNorm(_)
        | StepKind::Activation(_)
        | StepKind::MaxPool(_)
        | StepKind::Linear { .. } => true,
        StepKind::ConvBatchNorm { act, .. } => position == 0 || act.is_some(),
        StepKind::Add | StepKind::GlobalAvgPool | StepKind::Dropout(_) => false,
    }
}
