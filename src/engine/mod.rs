//! The engine: plans a graph once, allocates once, and runs it forward and backward.
//!
//! Autograd is the reverse walk of the plan. The fused plan is checked against the reference plan (one step per node).

mod gradients;
mod lower;
mod memory;
mod params;
mod pass;
mod plan;
mod sequence;

use std::ops::Range;
use std::sync::Mutex;

pub use gradients::GradientTable;
pub use plan::{Fusion, Pass, Plan, PlannedStep, StepCost, Target};
pub use sequence::{Backpropagated, Sequence, SequenceRun};

use crate::device::{Buffer, Device, SizedRecordings, View, ViewMut};
use crate::graph::{Graph, NodeId, ParamSpec};
use crate::model::{Model, Weights};
use crate::ops::config::KernelTarget;
use crate::ops::copy::copy;
use crate::ops::dropout::DropoutStream;
use crate::ops::optimizer::ParamSpan;
use crate::ops::step::{Backend, ParamId, Slopes};
use crate::ops::team;
use crate::{Error, Result};
use memory::{Layout, Memory};
use params::Params;
use pass::{Lent, Running, StepTimes};

/// Activations of one inference micro-batch that should stay in a core's cache, in elements.
const MICRO_BATCH_ELEMENTS: usize = 1 << 18;
/// Images of an inference micro-batch at most.
const MICRO_BATCH_IMAGES: usize = 64;

/// What an engine is planned for.
#[derive(Debug, Clone, PartialEq)]
pub struct EngineOptions {
    /// Images per pass; an inference pass may bring fewer, a training pass may not.
    pub batch: usize,
    /// Level of fusion.
    pub fusion: Fusion,
    /// Whether batch statistics are used and gradients can be asked for.
    pub training: bool,
    /// Values that stay readable after `forward` and may be given a gradient of their own in `backward`.
    pub taps: Vec<NodeId>,
}

/// Parameters, planned buffers and steps of one network on one device.
///
/// # Examples
/// One training pass: logits, and from their gradient that of every parameter.
/// ```
/// use depthshrinker::device::Device;
/// use depthshrinker::engine::{Engine, EngineOptions, Fusion};
/// use depthshrinker::model::Model;
/// use depthshrinker::networks::{NetworkOptions, build};
/// use depthshrinker::shape::Shape;
///
/// let graph = build("mobilenetv2-0.1", &NetworkOptions::new(Shape::new(32, 32, 3), 5))?;
/// let model = Model::initialise(graph, 7)?;
/// let options = EngineOptions { batch: 2, fusion: Fusion::OnLoad, training: true, taps: Vec::new() };
/// let mut engine = Engine::new(&Device::Cpu, &model, &options)?;
///
/// let images = vec![0.5; 2 * 32 * 32 * 3]; // [n, h, w, c]
/// let mut logits = [0.0; 2 * 5];
/// engine.forward(&images)?.read(&mut logits)?;
/// assert!(logits.iter().all(|v| v.is_finite()));
///
/// engine.backward(&Device::Cpu.upload(&[0.1; 2 * 5])?)?;
/// let (weights, gradients) = engine.trainable();
/// assert_eq!(weights.len(), gradients.len());
/// # Ok::<(), depthshrinker::Error>(())
/// ```
#[derive(Debug)]
pub struct Engine {
    /// Inference on a GPU, by the images of the pass. Before the buffers whose addresses they hold, so that they are dropped
    /// first.
    recordings: SizedRecordings,
    device: Device,
    options: EngineOptions,
    /// The network as given, whose node ids the caller uses.
    source: Graph,
    /// The network as planned, and where the source's values went.
    graph: Graph,
    map: Vec<NodeId>,
    plan: Plan,
    layout: Layout,
    params: Params,
    memory: Memory,
    /// Memories of inference micro-batches, one per thread that ever ran one.
    micro: Mutex<Vec<Memory>>,
    logits: Buffer,
    /// Images given to an engine that works in micro-batches.
    images: Vec<f32>,
    slopes: Option<Vec<f32>>,
    /// The slopes where a GPU's training pass reads them.
    slopes_at: Buffer,
    scores: Buffer,
    collect_scores: bool,
    loss_scale: f32,
    dropout: DropoutStream,
    /// Images of the pass.
    n: usize,
    /// Tapped values whose gradient was given since the forward pass.
    tapped: Vec<NodeId>,
    times: Option<StepTimes>,
}

impl EngineOptions {
    /// Whether batch-norm is folded away first.
    fn folds(&self) -> bool {
        !self.training && self.fusion > Fusion::PerNode
    }
}

/// Slopes as steps take them.
fn slopes<'a>(values: &'a Option<Vec<f32>>, at: Option<&'a Buffer>) -> Slopes<'a> {
    Slopes { values: values.as_deref(), at: at.map(|at| at.view(0..at.len())) }
}

/// Refuses a pass that a GPU's kernels cannot be launched on: they count pixels in 31 bits, and images along a dimension
/// of the grid that ends at 65535.
fn fits_launches(plan: &Plan, batch: usize) -> Result<()> {
    let pixels = plan.shapes.iter().map(|shape| shape.pixels()).max().unwrap_or(1);
    let most = 65_535.min((i32::MAX as usize - 256) / pixels.max(1));
    if batch > most {
        return Err(Error::Config(format!(
            "a GPU takes up to {most} images of this size a pass, not {batch}; lower the batch"
        )));
    }
    Ok(())
}

impl Engine {
    /// Plans, allocates and uploads. A fused inference engine folds batch-norm first.
    ///
    /// # Errors
    /// A graph that is not well formed, weights that do not fit it, or memory that cannot be had.
    pub fn new(device: &Device, model: &Model, options: &EngineOptions) -> Result<Self> {
        if options.batch == 0 {
            return Err(Error::Config("a batch needs at least one image".into()));
        }
        if let Some(tap) = options.taps.iter().find(|tap| tap.index() >= model.graph.nodes.len()) {
            return Err(Error::Graph(format!("tap {tap} is no node of {}", model.graph.name)));
        }
        let (planned, map) = match options.folds() {
            true => model.folded_with_map()?,
            false => (model.clone(), NodeId::all(model.graph.nodes.len()).collect()),
        };
        let taps = options.taps.iter().map(|&tap| map[tap]).collect();
        let target = match device {
            Device::Cpu => {
                Target { fusion: options.fusion, training: options.training, ..Target::inference(Backend::Host) }
            }
            Device::Gpu(gpu, dtype) => Target::gpu(KernelTarget::of(gpu, *dtype), options.fusion, options.training),
        };
        let target = Target { taps, ..target };
        let plan = Plan::new(&planned.graph, &target)?;
        if matches!(device, Device::Gpu(..)) {
            fits_launches(&plan, options.batch)?;
        }
        let layout = Layout::new(&plan);
        let params = Params::new(device, &planned, &plan)?;
        let sites = planned.graph.sites();
        let mut engine = Self {
            recordings: SizedRecordings::default(),
            device: device.clone(),
            options: options.clone(),
            source: model.graph.clone(),
            map,
            plan,
            layout,
            params,
            memory: Memory::default(),
            micro: Mutex::default(),
            logits: device.activations(options.batch * planned.graph.output_shape().len())?,
            images: Vec::new(),
            slopes: None,
            slopes_at: device.inputs(sites)?,
            scores: if options.training { device.outcomes(sites)? } else { device.zeros(sites)? },
            collect_scores: false,
            loss_scale: 1.0,
            dropout: DropoutStream::new(device)?,
            n: 0,
            tapped: Vec::new(),
            times: None,
            graph: planned.graph,
        };
        if engine.runs_whole_batches() {
            engine.memory = Memory::new(device, &engine.layout, options.batch)?;
        }
        Ok(engine)
    }

    /// The network as planned: for a fused inference engine the one with batch-norm folded.
    pub fn graph(&self) -> &Graph {
        &self.graph
    }

    /// The steps.
    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    /// The device.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// What the engine was planned for.
    pub fn options(&self) -> &EngineOptions {
        &self.options
    }

    /// Bytes of the planned activation and gradient buffers of a whole batch.
    pub fn planned_bytes(&self) -> u64 {
        (self.layout.elements_per_image() * self.options.batch * self.device.precision().bytes()) as u64
    }

    /// Bytes of all buffers held now, those of micro-batches included.
    pub fn allocated_bytes(&self) -> u64 {
        let micro = self.micro.lock().unwrap_or_else(|e| e.into_inner());
        let memories = micro.iter().chain([&self.memory]).map(Memory::bytes).sum::<u64>();
        let own = [&self.logits, &self.scores].into_iter().map(Buffer::bytes).sum::<u64>();
        memories + own + self.params.bytes()
    }

    /// Parameters of the planned network in the order of [`Graph::params`].
    pub fn params(&self) -> &[ParamSpec] {
        &self.params.specs
    }

    /// Replaces all weights; they are those of the network as given.
    ///
    /// # Errors
    /// When they do not fit it.
    pub fn load(&mut self, weights: &Weights) -> Result<()> {
        let model = Model::new(self.source.clone(), weights.clone())?;
        let planned = if self.options.folds() { model.folded()? } else { model };
        self.params.load(&planned.weights)
    }

    /// Copies all weights of the planned network, running statistics included, to the host.
    ///
    /// # Errors
    /// When the device fails.
    pub fn weights(&self) -> Result<Weights> {
        self.params.weights()
    }

    /// Sets the slope of the switchable activations, one per site: 0 the activation is there, 1 it is the identity.
    ///
    /// # Errors
    /// When there are not as many slopes as sites.
    pub fn set_slopes(&mut self, slopes: &[f32]) -> Result<()> {
        if slopes.len() != self.slopes_at.len() {
            let expected = format!("{} slopes, one per site", self.slopes_at.len());
            return Err(Error::shape("slopes", expected, slopes.len().to_string()));
        }
        if self.slopes.as_deref() != Some(slopes) {
            // Inference launches kernels with them as numbers.
            self.recordings.forget();
        }
        self.slopes = Some(slopes.to_vec());
        self.slopes_at.write(slopes)
    }

    /// Whether `backward` also sums ⟨dy, x − φ(x)⟩ for every site.
    pub fn collect_score_gradients(&mut self, on: bool) {
        self.collect_scores = on;
    }

    /// Σ ⟨dy, x − φ(x)⟩ over the activations of each site and the last batch: the straight-through gradient of a
    /// removal score (`docs/methods.md` 1.2).
    ///
    /// # Errors
    /// When the device fails.
    pub fn score_gradients(&self) -> Result<Vec<f32>> {
        let mut scores = vec![0.0; self.scores.len()];
        self.scores.read(&mut scores)?;
        scores.iter_mut().for_each(|score| *score /= self.loss_scale);
        Ok(scores)
    }

    /// Tells that the loss, and so every gradient, carries a factor; score gradients are given without it.
    pub fn set_loss_scale(&mut self, scale: f32) {
        self.loss_scale = scale;
    }

    /// Seeds dropout: its mask is a function of (seed, step) alone.
    ///
    /// # Errors
    /// When the device fails.
    pub fn set_step(&mut self, seed: u64, step: u64) -> Result<()> {
        self.dropout.set(seed, step)
    }

    /// Runs images `[n, h, w, c]` forward and returns the logits, of which the first n rows `[n, classes]` count; of a graph
    /// that ends in another value, that value.
    ///
    /// # Errors
    /// When the images are not whole, more than planned, or (in training) not exactly as many as planned.
    pub fn forward(&mut self, images: &[f32]) -> Result<&Buffer> {
        self.set_images(View::Host(images))?;
        self.run()
    }

    /// Takes the images `[n, h, w, c]` of the next passes, from the host or from the engine's device, in the type of
    /// activations.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn set_images(&mut self, images: View<'_>) -> Result<()> {
        let len = self.graph.input_shape().len();
        if !images.len().is_multiple_of(len) {
            let expected = format!("whole images of {}", self.graph.input_shape());
            return Err(Error::shape("forward", expected, format!("{} numbers", images.len())));
        }
        self.begin(images.len() / len)?;
        match images {
            View::Host(images) if self.runs_whole_batches() => {
                self.memory.of_mut(&self.layout, self.plan.value(NodeId::INPUT)).write(images)?;
            }
            View::Host(images) => self.images.copy_from_slice(images),
            View::Gpu(_) => copy(images, self.images_mut()),
            View::Packed(..) | View::HostSums(_) => return Err(Error::Config("images are numbers in f32".into())),
        }
        Ok(())
    }

    /// Begins passes over `n` images, which are to be written to [`images_mut`](Self::images_mut).
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn begin(&mut self, n: usize) -> Result<()> {
        let batch = self.options.batch;
        if n == 0 || n > batch || (self.options.training && n != batch) {
            let kind = if self.options.training { "exactly" } else { "1 to" };
            return Err(Error::shape("forward", format!("{kind} {batch} images"), n.to_string()));
        }
        self.n = n;
        // Before any pass that may be recorded: there it would be repeated each time.
        self.params.refresh();
        if !self.runs_whole_batches() {
            self.images.resize(n * self.graph.input_shape().len(), 0.0);
        }
        Ok(())
    }

    /// Where the images of the passes begun lie, `[n, h, w, c]`.
    pub fn images_mut(&mut self) -> ViewMut<'_> {
        if self.runs_whole_batches() {
            let len = self.n * self.graph.input_shape().len();
            self.memory.of_mut(&self.layout, self.plan.value(NodeId::INPUT)).view_mut(0..len)
        } else {
            ViewMut::Host(&mut self.images)
        }
    }

    /// The images of the last pass `[n, h, w, c]` on the engine's device.
    pub fn images(&self) -> View<'_> {
        if self.runs_whole_batches() {
            self.running().view(&self.memory, self.plan.value(NodeId::INPUT))
        } else {
            View::Host(&self.images)
        }
    }

    /// Runs the images that were set forward. On a GPU it may be part of recorded work; inference that is not is recorded by
    /// itself, and replayed from the third pass over as many images on.
    ///
    /// # Errors
    /// When the device fails, or no images were set.
    pub fn run(&mut self) -> Result<&Buffer> {
        if self.n == 0 {
            return Err(Error::Config("a pass needs images; set them first".into()));
        }
        self.tapped.clear();
        let training_slopes = self.options.training.then_some(&self.slopes_at);
        if !self.runs_whole_batches() {
            self.forward_in_micro_batches()?;
            return Ok(&self.logits);
        }
        let Self { recordings, device, plan, layout, dropout, params, memory, logits, .. } = self;
        let (slopes, times) = (slopes(&self.slopes, training_slopes), self.times.as_ref());
        let running = Running { plan, layout, n: self.n, slopes, dropout, images: None, times };
        let (training, output) = (plan.target.training, plan.value(self.graph.output()));
        let mut pass = || {
            let params = if training { Lent::Exclusive(params, None) } else { Lent::Shared(params) };
            running.run(0..plan.forward, params, memory);
            let output = running.view(memory, output);
            copy(output, logits.view_mut(0..output.len()));
            device.check()
        };
        if training || times.is_some() {
            // What steps take is told by the host's clock, and a training step is recorded whole.
            pass()?;
        } else {
            // SAFETY: the pass uses buffers of this engine alone, which are never replaced and are dropped after the recordings.
            unsafe { recordings.run(device, self.n, pass) }?;
        }
        Ok(&self.logits)
    }

    /// Begins to add up how long each step takes, by the host's clock.
    pub fn time_steps(&mut self) {
        self.times = Some(StepTimes::new(&self.plan));
    }

    /// Seconds that each step of the plan took since [`time_steps`](Self::time_steps), added up over passes. Where threads
    /// take micro-batches through the network side by side, it is the mean of them.
    pub fn step_seconds(&self) -> Vec<f64> {
        let beside = if self.runs_whole_batches() { 1 } else { self.micro_batches().min(team::threads()).max(1) };
        let seconds = self.times.as_ref().map_or_else(Vec::new, StepTimes::seconds);
        seconds.into_iter().map(|seconds| seconds / beside as f64).collect()
    }

    /// The logits of the last pass, of which the first n rows `[n, classes]` count.
    pub fn logits(&self) -> &Buffer {
        &self.logits
    }

    /// From the gradient of the logits `[n, classes]` to the gradient of every parameter. Gradients that were given to
    /// tapped values since the forward pass are added.
    ///
    /// # Errors
    /// When the engine was not planned for training, or the device fails.
    pub fn backward(&mut self, d_logits: &Buffer) -> Result<()> {
        if !self.options.training || self.n == 0 {
            return Err(Error::Config("backward needs an engine planned for training and a forward pass".into()));
        }
        self.scores.clear()?;
        let output = self.graph.output();
        let Self { plan, layout, dropout, params, memory, .. } = self;
        let (slopes, times) = (slopes(&self.slopes, Some(&self.slopes_at)), self.times.as_ref());
        let running = Running { plan, layout, n: self.n, slopes, dropout, images: None, times };
        for &(node, gradient) in plan.given() {
            if node == output {
                let to = running.view_mut(memory, gradient);
                copy(d_logits.view(0..to.len()), to);
            } else if !self.tapped.contains(&node) {
                // Nothing was given, and the steps add to what is there.
                memory.of_mut(layout, gradient).clear()?;
            }
        }
        self.tapped.clear();
        let scores = self.collect_scores.then_some(&mut self.scores);
        running.run(plan.forward..plan.steps.len(), Lent::Exclusive(params, scores), memory);
        self.device.check()
    }

    /// A tapped value `[n, h, w, c]` of the last forward pass.
    ///
    /// # Errors
    /// When the node was not tapped.
    pub fn tap(&self, node: NodeId) -> Result<View<'_>> {
        let planned = self.tapped_node(node)?;
        Ok(self.running().view(&self.memory, self.plan.value(planned)))
    }

    /// Calls `give` with a tapped value `[n, h, w, c]` of the last forward pass and a gradient of that shape, which it is
    /// to fill, for the backward pass that follows.
    ///
    /// # Errors
    /// When the node was not tapped, has been given a gradient already, or `give` fails.
    pub fn give_gradient(
        &mut self,
        node: NodeId,
        give: impl FnOnce(View<'_>, ViewMut<'_>) -> Result<()>,
    ) -> Result<()> {
        let planned = self.tapped_node(node)?;
        if !self.options.training || self.tapped.contains(&planned) {
            let got = format!("a second one for node {node}, or a plan without gradients");
            return Err(Error::shape("a tap's gradient", "one per training pass", got));
        }
        let gradient = self.plan.given_gradient(planned);
        let mut taken = self.memory.take(&self.layout, gradient);
        let running = self.running();
        let value = running.view(&self.memory, self.plan.value(planned));
        let outcome = give(value, taken.view_mut(0..value.len()));
        self.memory.put(&self.layout, gradient, taken);
        self.tapped.push(planned);
        outcome
    }

    fn tapped_node(&self, node: NodeId) -> Result<NodeId> {
        if self.options.taps.contains(&node) {
            return Ok(self.map[node]);
        }
        Err(Error::Graph(format!("node {node} was not tapped when the engine was planned")))
    }

    /// All trained parameters and their gradients as two flat buffers of one length.
    pub fn trainable(&mut self) -> (&mut Buffer, &mut Buffer) {
        self.params.for_change()
    }

    /// Weights, gradients, and the copy of the weights that kernels read where it is of another type: an optimizer
    /// writes both.
    pub fn for_update(&mut self) -> (&mut Buffer, &Buffer, Option<&mut Buffer>) {
        self.params.for_update()
    }

    /// Where each trained parameter lies in the flat buffers: index into [`params`](Self::params), and range.
    pub fn trainable_ranges(&self) -> &[(ParamId, Range<usize>)] {
        &self.params.trained
    }

    /// The trained parameters in the flat buffers, in order, and which of them decay.
    pub fn optimizer_spans(&self) -> Vec<ParamSpan> {
        let span = |(param, range): &(ParamId, Range<usize>)| ParamSpan {
            range: range.clone(),
            decayed: self.params.specs[*param].role.is_decayed(),
        };
        let mut spans: Vec<ParamSpan> = self.params.trained.iter().map(span).collect();
        spans.sort_by_key(|span| span.range.start);
        spans
    }

    /// The pass as far as its sizes go.
    fn running(&self) -> Running<'_> {
        let Self { plan, layout, dropout, .. } = self;
        Running { plan, layout, n: self.n, slopes: Slopes::default(), dropout, images: None, times: None }
    }

    /// Micro-batches pay only where a pass keeps nothing and steps need no batch statistics.
    fn runs_whole_batches(&self) -> bool {
        let host = self.device == Device::Cpu;
        !host || self.options.training || self.options.fusion == Fusion::PerNode || !self.options.taps.is_empty()
    }

    /// Images that go through the network together: on the CPU, in inference, those of a micro-batch, else the batch.
    pub fn images_at_once(&self) -> usize {
        if self.runs_whole_batches() {
            return self.options.batch;
        }
        // Every micro-batch reads all weights anew, so its activations may take as much as they do, even where they leave the
        // cache.
        let elements = MICRO_BATCH_ELEMENTS.max(self.params.trained_elements());
        (elements / self.layout.elements_per_image().max(1)).clamp(1, MICRO_BATCH_IMAGES).min(self.options.batch)
    }

    /// Micro-batches of the pass: as many for each thread, so that none waits for another.
    fn micro_batches(&self) -> usize {
        self.n.div_ceil(self.images_at_once()).next_multiple_of(team::threads()).min(self.n)
    }

    /// Inference on the CPU: each thread takes a few images through the whole network, so that activations never
    /// leave its cache. The split depends on the network alone, so results do not depend on the threads.
    fn forward_in_micro_batches(&mut self) -> Result<()> {
        let (micro, batches) = (self.images_at_once(), self.micro_batches());
        let output = self.plan.shapes[self.graph.output()].len();
        let mut logits = std::mem::take(&mut self.logits);
        let failed = Mutex::new(None);
        let of_pass = logits.view_mut(0..self.n * output).host();
        team::each_part(of_pass, output, batches, |images, logits| {
            if let Err(error) = self.forward_micro_batch(micro, images, logits) {
                *failed.lock().unwrap_or_else(|e| e.into_inner()) = Some(error);
            }
        });
        self.logits = logits;
        failed.into_inner().unwrap_or_else(|e| e.into_inner()).map_or(Ok(()), Err)
    }

    /// Some images of the pass, at most `micro`, on the caller's thread, and on all where the others have none.
    fn forward_micro_batch(&self, micro: usize, images: Range<usize>, logits: &mut [f32]) -> Result<()> {
        let idle = self.micro.lock().unwrap_or_else(|e| e.into_inner()).pop();
        let mut memory = match idle {
            Some(memory) => memory,
            None => Memory::new(&self.device, &self.layout, micro)?,
        };
        let (plan, layout, len) = (&self.plan, &self.layout, self.graph.input_shape().len());
        let (slopes, times) = (slopes(&self.slopes, None), self.times.as_ref());
        let given = Some((plan.value(NodeId::INPUT), &self.images[images.start * len..images.end * len]));
        let running = Running { plan, layout, n: images.len(), slopes, dropout: &self.dropout, images: given, times };
        running.run(0..plan.steps.len(), Lent::Shared(&self.params), &mut memory);
        logits.copy_from_slice(running.view(&memory, plan.value(self.graph.output())).host());
        self.micro.lock().unwrap_or_else(|e| e.into_inner()).push(memory);
        Ok(())
    }
}
