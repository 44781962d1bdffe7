//! Planning which values share memory: every value lives from the first step that writes it to the last that uses it.

use crate::Result;
use crate::device::{Buffer, Device};
use crate::graph::NodeId;
use crate::ops::step::{Extent, Place, Store, ValueId};

use super::plan::Plan;

/// Index of a buffer that several values use one after the other.
type Slot = usize;

/// What values of a slot have in common.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Kind {
    store: Store,
    per_image: bool,
}

/// Where each planned value lies.
#[derive(Debug, Clone)]
pub(super) struct Layout {
    /// Slot of each value; `None` for those that lie elsewhere or are never used.
    slot: Vec<Option<Slot>>,
    /// Kind of every slot, and its elements per image or in all.
    slots: Vec<(Kind, usize)>,
}

/// The buffers of one pass.
#[derive(Debug, Default)]
pub(super) struct Memory {
    slots: Vec<Buffer>,
}

/// Something that needs memory from one time to another.
struct Item {
    value: ValueId,
    kind: Kind,
    len: usize,
    from: usize,
    to: usize,
}

impl Layout {
    /// Plans memory. Time runs 0 for the image, i + 1 for forward step i, then the loss, then the backward steps.
    pub fn new(plan: &Plan) -> Self {
        let loss = plan.forward + 1;
        let mut lives: Vec<Option<(usize, usize)>> = vec![None; plan.values.len()];
        let mut touch = |value: ValueId, time: usize| {
            let (from, to) = lives[value.index()].unwrap_or((time, time));
            lives[value.index()] = Some((from.min(time), to.max(time)));
        };
        touch(plan.value(NodeId::INPUT), 0);
        // Whoever runs the plan reads the output and the taps, and gives their gradients.
        for node in plan.target.taps.iter().copied().chain([NodeId::new(plan.shapes.len() - 1)]) {
            touch(plan.value(node), loss);
        }
        plan.given().iter().for_each(|&(_, gradient)| touch(gradient, loss));
        for (index, step) in plan.steps.iter().enumerate() {
            let time = if index < plan.forward { index + 1 } else { index + 2 };
            step.uses.all().for_each(|value| touch(value, time));
        }
        let items = plan.values.iter().filter_map(|(id, value)| {
            let (from, to) = lives[id.index()].filter(|_| value.place == Place::Planned)?;
            let (per_image, len) = match value.extent {
                Extent::PerImage(len) => (true, len),
                Extent::Fixed(len) => (false, len),
            };
            Some(Item { value: id, kind: Kind { store: value.store, per_image }, len, from, to })
        });
        Self::assign(items.collect(), plan.values.len())
    }

    /// Gives every item the free slot of its kind that fits best.
    fn assign(mut items: Vec<Item>, values: usize) -> Self {
        let mut layout = Self { slot: vec![None; values], slots: Vec::new() };
        items.sort_by_key(|item| (item.from, std::cmp::Reverse(item.len)));
        let mut busy_until: Vec<usize> = Vec::new();
        for item in items {
            let is_free = |&slot: &usize| busy_until[slot] < item.from && layout.slots[slot].0 == item.kind;
            // The smallest that is large enough, else the largest, which then grows.
            let fit = |slot: &usize| {
                let size = layout.slots[*slot].1;
                if size >= item.len { (0, size) } else { (1, usize::MAX - size) }
            };
            let slot = (0..layout.slots.len()).filter(is_free).min_by_key(fit).unwrap_or_else(|| {
                layout.slots.push((item.kind, 0));
                busy_until.push(0);
                layout.slots.len() - 1
            });
            layout.slots[slot].1 = layout.slots[slot].1.max(item.len);
            busy_until[slot] = item.to;
            layout.slot[item.value.index()] = Some(slot);
        }
        layout
    }

    /// Elements of activations per image.
    pub fn elements_per_image(&self) -> usize {
        self.slots.iter().filter(|(kind, _)| kind.per_image).map(|(_, len)| len).sum()
    }

    fn slot(&self, value: ValueId) -> Slot {
        self.slot[value.index()].unwrap_or_else(|| panic!("{value:?} was not given memory"))
    }
}

impl Memory {
    pub fn new(device: &Device, layout: &Layout, batch: usize) -> Result<Self> {
        let buffer = |&(kind, len): &(Kind, usize)| {
            let len = if kind.per_image { len * batch } else { len };
            match kind.store {
                Store::Activation => device.activations(len),
                Store::Float => device.zeros(len),
                Store::Sum => device.sums(len),
            }
        };
        Ok(Self { slots: layout.slots.iter().map(buffer).collect::<Result<_>>()? })
    }

    /// Bytes of all buffers.
    pub fn bytes(&self) -> u64 {
        self.slots.iter().map(Buffer::bytes).sum()
    }

    /// The buffer that holds a value.
    pub fn of(&self, layout: &Layout, value: ValueId) -> &Buffer {
        &self.slots[layout.slot(value)]
    }

    /// The same, to be written.
    pub fn of_mut(&mut self, layout: &Layout, value: ValueId) -> &mut Buffer {
        &mut self.slots[layout.slot(value)]
    }

    /// Takes the buffer of a value out, so that it can be written while others are read.
    pub fn take(&mut self, layout: &Layout, value: ValueId) -> Buffer {
        std::mem::take(&mut self.slots[layout.slot(value)])
    }

    /// Puts it back.
    pub fn put(&mut self, layout: &Layout, value: ValueId, buffer: Buffer) {
        self.slots[layout.slot(value)] = buffer;
    }
}
