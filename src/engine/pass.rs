//! Running steps: lends each the values it names.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use crate::device::{Buffer, View, ViewMut};
use crate::ops::dropout::DropoutStream;
use crate::ops::step::{Few, Io, Place, Slopes, ValueId};

use super::memory::{Layout, Memory};
use super::params::Params;
use super::plan::{Plan, PlannedStep};

/// What is fixed during one pass.
pub(super) struct Running<'a> {
    pub plan: &'a Plan,
    pub layout: &'a Layout,
    /// Images in this pass.
    pub n: usize,
    /// Slopes of masked activations.
    pub slopes: Slopes<'a>,
    /// What dropout draws from.
    pub dropout: &'a DropoutStream,
    /// The images and their value, where they are read from where the caller has them; else that value is in memory.
    pub images: Option<(ValueId, &'a [f32])>,
    /// Where it is asked for how long steps take.
    pub times: Option<&'a StepTimes>,
}

/// How long each step of a plan took, added up over passes, and over the threads that took micro-batches through it.
#[derive(Debug)]
pub(super) struct StepTimes(Vec<AtomicU64>);

impl StepTimes {
    pub fn new(plan: &Plan) -> Self {
        Self(plan.steps.iter().map(|_| AtomicU64::new(0)).collect())
    }

    pub fn seconds(&self) -> Vec<f64> {
        self.0.iter().map(|nanoseconds| nanoseconds.load(Ordering::Relaxed) as f64 * 1e-9).collect()
    }

    fn add(&self, step: usize, since: Instant) {
        self.0[step].fetch_add(since.elapsed().as_nanos() as u64, Ordering::Relaxed);
    }
}

/// Parameters as a pass may use them.
pub(super) enum Lent<'a> {
    /// To be read, as several threads do at once.
    Shared(&'a Params),
    /// Running statistics and gradients to be written too, and the score gradients where they are asked for.
    Exclusive(&'a mut Params, Option<&'a mut Buffer>),
}

impl Lent<'_> {
    fn reborrow(&mut self) -> Lent<'_> {
        match self {
            Self::Shared(params) => Lent::Shared(params),
            Self::Exclusive(params, scores) => Lent::Exclusive(params, scores.as_deref_mut()),
        }
    }
}

/// Values of one buffer that a step writes, and where they lie.
struct Written(Few<Option<(ValueId, Range<usize>)>>);

impl Written {
    fn new() -> Self {
        Self(Few::new())
    }

    /// Lends them in the order in which they lie.
    ///
    /// # Panics
    /// When they overlap: they were planned apart from each other.
    fn lend<'a>(mut self, io: &mut Io<'a>, buffer: &'a mut Buffer) {
        let start_of = |entry: &&mut Option<(ValueId, Range<usize>)>| entry.as_ref().map(|(_, range)| range.start);
        let (len, mut start) = (buffer.len(), 0);
        let mut rest = buffer.view_mut(0..len);
        while let Some((id, range)) =
            self.0.iter_mut().filter(|entry| entry.is_some()).min_by_key(start_of).and_then(Option::take)
        {
            let skipped = range.start.checked_sub(start).expect("ranges planned apart from each other");
            let (view, tail) = rest.split_at(skipped).1.split_at(range.len());
            io.lend_mut(id, view);
            (rest, start) = (tail, range.end);
        }
    }
}

impl<'a> Running<'a> {
    /// Runs some steps of the plan, one behind the other.
    pub fn run(&self, steps: Range<usize>, mut params: Lent<'_>, memory: &mut Memory) {
        for index in steps {
            let began = self.times.map(|times| (times, Instant::now()));
            self.run_step(&self.plan.steps[index], params.reborrow(), memory);
            if let Some((times, began)) = began {
                times.add(index, began);
            }
        }
    }

    fn run_step(&self, step: &PlannedStep, params: Lent<'_>, memory: &mut Memory) {
        let place = |id: ValueId| self.plan.values.get(id).place;
        let planned = step.uses.writes.iter().copied().filter(|&id| place(id) == Place::Planned);
        let mut taken = Few::new();
        planned.for_each(|id| taken.push((id, memory.take(self.layout, id))));
        let mut io = Io::new(self.n, self.slopes, self.dropout);
        for (id, buffer) in taken.iter_mut() {
            let len = self.len(*id);
            io.lend_mut(*id, buffer.view_mut(0..len));
        }
        match params {
            Lent::Shared(params) => {
                for &id in &step.uses.reads {
                    io.lend(id, self.read(id, memory, |place| params.read(place)));
                }
                step.step.run(&mut io);
            }
            Lent::Exclusive(params, scores) => {
                let (mut running, mut gradients, mut of_scores) = (Written::new(), Written::new(), Written::new());
                for &id in &step.uses.writes {
                    let (to, range) = match place(id) {
                        Place::Running(param) => (&mut running, params.range(param)),
                        Place::ParamGradient(param) => (&mut gradients, params.range(param)),
                        Place::Score(site) => (&mut of_scores, site.index()..site.index() + 1),
                        _ => continue,
                    };
                    to.0.push(Some((id, range)));
                }
                let parts = params.parts();
                for &id in &step.uses.reads {
                    io.lend(id, self.read(id, memory, |place| parts.read(place)));
                }
                running.lend(&mut io, parts.running);
                gradients.lend(&mut io, parts.gradients);
                if let Some(scores) = scores {
                    of_scores.lend(&mut io, scores);
                }
                step.step.run(&mut io);
            }
        }
        for (id, buffer) in taken.into_iter() {
            memory.put(self.layout, id, buffer);
        }
    }

    fn read<'m>(&self, id: ValueId, memory: &'m Memory, of_params: impl FnOnce(Place) -> View<'m>) -> View<'m>
    where
        'a: 'm,
    {
        match self.plan.values.get(id).place {
            Place::Planned => self.view(memory, id),
            place => of_params(place),
        }
    }

    /// Elements of a value for the images of this pass.
    pub fn len(&self, id: ValueId) -> usize {
        self.plan.values.get(id).len(self.n)
    }

    /// A stored value, or the images where the caller has them.
    pub fn view<'m>(&self, memory: &'m Memory, id: ValueId) -> View<'m>
    where
        'a: 'm,
    {
        match self.images {
            Some((images, data)) if images == id => View::Host(data),
            _ => memory.of(self.layout, id).view(0..self.len(id)),
        }
    }

    /// The same, to be written.
    pub fn view_mut<'m>(&self, memory: &'m mut Memory, id: ValueId) -> ViewMut<'m> {
        let len = self.len(id);
        memory.of_mut(self.layout, id).view_mut(0..len)
    }
}
