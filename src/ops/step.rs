//! A step: the unit that the engine runs, the bench times, `check` compares and the cost model counts.
//!
//! A step names the values it reads and writes; whoever hosts it decides where they lie and lends them through [`Io`].
//! Everything that is asked of a network as a whole (memory, bytes, launches, roofline, execution) is a fold over its list
//! of steps. The backward pass of a step is steps again ([`Step::gradient`]).

use std::fmt::Debug;

use super::activation::{Act, Activation};
use super::batch_norm::{NormGradient, PlannedNormalisation};
use super::conv::ConvProblem;
use super::dropout::DropoutStream;
use super::packing::Packing;
pub use crate::device::Backend;
use crate::device::{View, ViewMut};
use crate::dtype::Dtype;
pub use crate::index::{ParamId, SiteId, ValueId};
use crate::shape::Shape;

/// How many elements a value has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Extent {
    /// So many for every image of the batch.
    PerImage(usize),
    /// So many, whatever the batch.
    Fixed(usize),
}

/// The type of a value's elements.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Store {
    /// The type of activations: `f32`, `f16` or `bf16`.
    Activation,
    /// `f32` on every device.
    Float,
    /// Sums over a batch: `f64` on the host, `f32` on a GPU.
    Sum,
}

/// Where a value lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Place {
    /// In memory that is planned from the first step that writes it to the last that uses it.
    Planned,
    /// A trained parameter, in `f32`.
    Param(ParamId),
    /// A trained parameter in the type of activations.
    Weight(ParamId),
    /// A running statistic of a batch-norm.
    Running(ParamId),
    /// The gradient of a trained parameter.
    ParamGradient(ParamId),
    /// Σ ⟨dy, x − φ(x)⟩ over the activations of a site; lent only while it is asked for.
    Score(SiteId),
}

/// One thing that steps read or write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Value {
    /// Its size.
    pub extent: Extent,
    /// The type of its elements.
    pub store: Store,
    /// Where it lies.
    pub place: Place,
}

impl Value {
    /// Elements for a batch of `n` images.
    pub fn len(&self, n: usize) -> usize {
        match self.extent {
            Extent::PerImage(len) => n * len,
            Extent::Fixed(len) => len,
        }
    }

    /// Bytes for a batch of `n` images in a precision, sums counted as on a GPU.
    pub fn bytes(&self, n: usize, precision: Dtype) -> u64 {
        let element = if self.store == Store::Activation { precision.bytes() } else { size_of::<f32>() };
        (self.len(n) * element) as u64
    }
}

/// The values of a list of steps.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Values(Vec<Value>);

impl Values {
    /// Adds a value.
    pub fn add(&mut self, extent: Extent, store: Store, place: Place) -> ValueId {
        self.0.push(Value { extent, store, place });
        ValueId::new(self.0.len() - 1)
    }

    /// Adds an activation, or the gradient of one.
    pub fn activation(&mut self, shape: Shape) -> ValueId {
        self.add(Extent::PerImage(shape.len()), Store::Activation, Place::Planned)
    }

    /// Adds numbers in `f32` that do not grow with the batch.
    pub fn floats(&mut self, len: usize) -> ValueId {
        self.add(Extent::Fixed(len), Store::Float, Place::Planned)
    }

    /// The value that lies at a place outside planned memory, added where it is not known yet.
    pub fn pinned(&mut self, place: Place, len: usize) -> ValueId {
        if let Some(known) = self.0.iter().position(|value| value.place == place) {
            return ValueId::new(known);
        }
        let store = if matches!(place, Place::Weight(_)) { Store::Activation } else { Store::Float };
        self.add(Extent::Fixed(len), store, place)
    }

    /// A value.
    pub fn get(&self, id: ValueId) -> &Value {
        &self.0[id]
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// All values with their ids, in the order in which they were added.
    pub fn iter(&self) -> impl Iterator<Item = (ValueId, &Value)> {
        ValueId::enumerate(&self.0)
    }
}

/// What a step reads and writes. A value that is added to counts as written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Uses {
    /// Values it reads.
    pub reads: Vec<ValueId>,
    /// Values it writes, or adds to.
    pub writes: Vec<ValueId>,
    /// Those of `writes` that it adds to, which reads them as well.
    pub adds: Vec<ValueId>,
}

impl Uses {
    /// What reads some values and writes others.
    pub fn new(reads: impl IntoIterator<Item = ValueId>, writes: impl IntoIterator<Item = ValueId>) -> Self {
        Self { reads: reads.into_iter().collect(), writes: writes.into_iter().collect(), adds: Vec::new() }
    }

    /// The same, with a gradient that is written or added to.
    pub fn with(mut self, target: impl IntoIterator<Item = Sink>) -> Self {
        for Sink { value, add } in target {
            self.writes.push(value);
            self.adds.extend(add.then_some(value));
        }
        self
    }

    /// Everything it uses, each value once.
    pub fn all(&self) -> impl Iterator<Item = ValueId> + '_ {
        let first = |(at, id): (usize, &ValueId)| (!self.reads[..at].contains(id)).then_some(*id);
        let reads = self.reads.iter().enumerate().filter_map(first);
        reads.chain(self.writes.iter().copied().filter(|id| !self.reads.contains(id)))
    }
}

/// A gradient to be written, or added to where an earlier step has written it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sink {
    /// The gradient.
    pub value: ValueId,
    /// Whether to add.
    pub add: bool,
}

/// Which arithmetic unit a step runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ComputeUnit {
    /// Matrix units where the machine has them: dense and pointwise convolutions, linear layers.
    Matrix,
    /// Plain vector arithmetic: depthwise convolutions and everything per-element.
    Vector,
}

/// What a step computes per image. What it moves follows from its values: each is read or written once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Work {
    /// Floating-point operations per image, a multiply-accumulate counted as two.
    pub flops: u64,
    /// The unit that limits it.
    pub unit: ComputeUnit,
}

impl Work {
    /// Work of the vector units.
    pub const fn vector(flops: u64) -> Self {
        Self { flops, unit: ComputeUnit::Vector }
    }
}

/// A piece of a network's work.
///
/// # Examples
/// A step outside of any network: what it uses, its result, and its backward pass, which is steps again.
/// ```
/// use depthshrinker::device::Device;
/// use depthshrinker::engine::{Sequence, SequenceRun};
/// use depthshrinker::ops::pool::global::GlobalPoolStep;
/// use depthshrinker::ops::step::{Backend, Step, Values};
/// use depthshrinker::shape::Shape;
///
/// let mut values = Values::default();
/// let input = Shape::new(2, 3, 1);
/// let (x, y) = (values.activation(input), values.activation(Shape::new(1, 1, 1)));
/// let step = GlobalPoolStep { input, x, y };
/// assert_eq!((step.uses().reads, step.uses().writes), (vec![x], vec![y]));
///
/// let pool = Sequence::new(values, vec![Box::new(step)]);
/// let mut run = SequenceRun::new(&Device::Cpu, &pool, 1)?;
/// run.buffer_mut(x).unwrap().write(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])?;
/// run.run();
/// let mut mean = [0.0];
/// run.buffer(y).read(&mut mean)?;
/// assert_eq!(mean, [3.5]);
///
/// let backward = pool.backward(Backend::Host, &[y], &[]);
/// assert_eq!(backward.steps.steps.len(), 1);
/// assert!(backward.gradients.of(x).is_some());
/// # Ok::<(), depthshrinker::Error>(())
/// ```
pub trait Step: Debug + Send + Sync {
    /// What it computes, in words such as `pointwise 1x1 + activation`.
    fn describe(&self) -> String;

    /// The values it reads and writes.
    fn uses(&self) -> Uses;

    /// What it computes per image.
    fn work(&self) -> Work;

    /// Does it. On a GPU it may not be done yet when this returns, and may be part of recorded work.
    fn run(&self, io: &mut Io<'_>);

    /// Its backward pass: appends the steps that turn the gradients of what it writes into those of what it reads. Steps
    /// without one belong to inference alone.
    fn gradient(&self, to: &mut dyn Backward);

    /// Weights that the host reads packed, where they are packed ahead of many passes.
    fn packed(&self) -> Vec<(ValueId, Packing)> {
        Vec::new()
    }

    /// The convolution that it computes forward, for one image: what a bench names and a peer repeats.
    fn convolution(&self) -> Option<&ConvProblem> {
        None
    }
}

/// The gradient of a value, as the steps before the one that wrote the value read it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum GradientOperand {
    /// It lies in memory.
    Stored(ValueId),
    /// It is formed on load, from the gradient behind the normalisation and the batch's sums.
    Formed(NormGradient),
}

impl GradientOperand {
    /// The values that are read to have it.
    pub fn reads(&self) -> Vec<ValueId> {
        match self {
            Self::Stored(value) => vec![*value],
            Self::Formed(of) => of.reads(),
        }
    }
}

/// Where a step's backward pass is appended.
pub trait Backward {
    /// Who will run it.
    fn backend(&self) -> Backend;

    /// Adds a value that only the backward pass has.
    fn values(&mut self) -> &mut Values;

    /// The gradient of a value that the step wrote; `None` where nothing that counts was made of it.
    fn of(&self, value: ValueId) -> Option<GradientOperand>;

    /// Where the gradient of a value that the step read goes; `None` where nobody needs it, such as the image's.
    fn sink(&mut self, value: ValueId) -> Option<Sink>;

    /// Says that the gradient of a value need not be stored.
    fn form(&mut self, value: ValueId, gradient: NormGradient);

    /// Where the gradient of a parameter goes.
    fn param_gradient(&mut self, param: ValueId) -> ValueId;

    /// Where the score gradient of an activation goes; `None` where no mask switches it.
    fn score(&mut self, act: Option<&Activation>) -> Option<ValueId>;

    /// Appends a step.
    fn push(&mut self, step: Box<dyn Step>);
}

impl dyn Backward + '_ {
    /// The stored gradient of a value that the step wrote.
    ///
    /// # Panics
    /// Where it is formed on load: a plan lets only convolutions read such a gradient.
    pub(super) fn stored(&self, value: ValueId) -> Option<ValueId> {
        self.of(value).map(|gradient| match gradient {
            GradientOperand::Stored(gradient) => gradient,
            GradientOperand::Formed(_) => panic!("only a convolution's gradient is formed on load"),
        })
    }
}

/// What a convolution reads.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Operand {
    /// A stored value.
    Stored(ValueId),
    /// The raw result of a convolution before, normalised and activated on load (level `OnLoad`, `docs/kernels.md` a).
    Normalised(PlannedNormalisation),
}

impl Operand {
    /// The values that are read to have it.
    pub fn reads(&self) -> Vec<ValueId> {
        match self {
            Self::Stored(value) => vec![*value],
            Self::Normalised(of) => of.reads(),
        }
    }
}

/// Entries of a list that lie on the stack.
const FEW: usize = 12;

/// A list that lies on the stack as long as it has few entries, as those of a step's values have: a pass allocates nothing.
pub(crate) struct Few<T> {
    first: [Option<T>; FEW],
    count: usize,
    rest: Vec<T>,
}

impl<T> Few<T> {
    pub fn new() -> Self {
        Self { first: [const { None }; FEW], count: 0, rest: Vec::new() }
    }

    pub fn push(&mut self, entry: T) {
        match self.first.get_mut(self.count) {
            Some(free) => (*free, self.count) = (Some(entry), self.count + 1),
            None => self.rest.push(entry),
        }
    }

    pub fn iter(&self) -> impl Iterator<Item = &T> {
        self.first[..self.count].iter().flatten().chain(&self.rest)
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.first[..self.count].iter_mut().flatten().chain(&mut self.rest)
    }

    pub fn into_iter(self) -> impl Iterator<Item = T> {
        self.first.into_iter().flatten().chain(self.rest)
    }
}

/// The values of one step while it runs.
pub struct Io<'a> {
    /// Images in the batch.
    n: usize,
    reads: Few<(ValueId, View<'a>)>,
    writes: Few<(ValueId, Option<ViewMut<'a>>)>,
    slopes: Slopes<'a>,
    dropout: &'a DropoutStream,
}

/// Slopes of masked activations, by site.
#[derive(Debug, Clone, Copy, Default)]
pub struct Slopes<'a> {
    /// The slopes; without them each activation has its own.
    pub values: Option<&'a [f32]>,
    /// The same on a GPU, where they may change under a recorded pass.
    pub at: Option<View<'a>>,
}

impl<'a> Io<'a> {
    /// What a step is lent: its batch, its values in any order (a score that nobody asks for is left out), and the state of
    /// the pass.
    pub fn new(n: usize, slopes: Slopes<'a>, dropout: &'a DropoutStream) -> Self {
        Self { n, reads: Few::new(), writes: Few::new(), slopes, dropout }
    }

    /// Lends a value to be read.
    pub fn lend(&mut self, id: ValueId, view: View<'a>) {
        self.reads.push((id, view));
    }

    /// Lends a value to be written.
    pub fn lend_mut(&mut self, id: ValueId, view: ViewMut<'a>) {
        self.writes.push((id, Some(view)));
    }

    /// Images in the batch.
    pub fn n(&self) -> usize {
        self.n
    }

    /// A value that the step reads.
    ///
    /// # Panics
    /// When the step did not name it in [`Step::uses`].
    pub fn read(&self, id: ValueId) -> View<'a> {
        let found = self.reads.iter().find(|(known, _)| *known == id);
        found.unwrap_or_else(|| panic!("a step reads {id:?} without having named it")).1
    }

    /// A value that the step writes; it can be had once.
    ///
    /// # Panics
    /// When the step did not name it in [`Step::uses`], or has it already.
    pub fn write(&mut self, id: ValueId) -> ViewMut<'a> {
        self.write_if_lent(id).unwrap_or_else(|| panic!("a step writes {id:?} without having named it"))
    }

    /// A value that is lent only while it is asked for, such as a score.
    pub fn write_if_lent(&mut self, id: ValueId) -> Option<ViewMut<'a>> {
        self.writes.iter_mut().find(|(known, _)| *known == id)?.1.take()
    }

    /// A gradient to be written or added to.
    pub fn write_into(&mut self, target: Sink) -> (ViewMut<'a>, bool) {
        (self.write(target.value), target.add)
    }

    /// An activation with the slope that its site has now.
    pub fn act(&self, activation: &Activation) -> Act<'a> {
        let of_site = activation.site.zip(self.slopes.values);
        let slope = of_site.map_or(activation.slope, |(site, slopes)| slopes[site]);
        let at = of_site.and_then(|(site, _)| Some(self.slopes.at?.slice(site.index()..site.index() + 1)));
        Act::new(activation.limit, slope).at(at)
    }

    /// What dropout draws from.
    pub fn dropout(&self) -> &'a DropoutStream {
        self.dropout
    }
}
