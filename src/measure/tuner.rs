//! Finds the fastest configuration of every problem of a network, among all that solve it.
//!
//! A problem is timed inside of the step that poses it, so that the small kernels which a configuration calls for, such as the sum of its
//! slabs, count too. A configuration must give what the engine's own gives before its time counts. Two are timed in
//! turns, the fastest so far and the next, and the next one has to be faster by a margin: noise changes nothing.

use std::collections::HashSet;
use std::time::Duration;

use serde::Serialize;

use super::launches::{Launches, rotation, sample_in_turns};
use super::layer_run::LayerBench;
use super::step_launches::DistinctStep;
use super::timer::median;
use crate::device::configurations::{Choice, Decision};
use crate::device::gpu::Gpu;
use crate::device::tuned::Tuned;
use crate::device::{Buffer, Device};
use crate::dtype::Dtype;
use crate::engine::{Sequence, SequenceRun};
use crate::ops::copy::copy;
use crate::{Error, Result};

/// How much less time another configuration must take, as a share of that of the fastest so far.
const MARGIN: f64 = 0.02;
/// How far results may be apart, as a share of the largest: sums in `f32` that were taken in another order.
const ORDER: f64 = 1e-4;
/// The same for results that are rounded to a 16-bit type: so many times the distance of 1 to the next number.
const ROUNDING: f64 = 4.0;

/// Numbers at each end of a result that are compared: what is between are tiles like the first.
const END: usize = 1 << 19;

/// What was found for a problem: an entry of `bench kernels --tune`.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct TunedRecord {
    /// Name of the step that posed it first.
    pub step: String,
    /// What that step does.
    pub kind: String,
    /// The choice and its outcome.
    #[serde(flatten)]
    pub tuned: Tuned,
    /// Configurations that were timed.
    pub timed: usize,
    /// Configurations that failed or gave something else, each with what happened.
    pub failed: Vec<String>,
}

/// Choices to be tuned, and how.
pub struct Tuner<'a> {
    device: &'a Device,
    bench: LayerBench,
    batch: usize,
    /// Each choice once, in the first step that has it.
    choices: Vec<(&'a DistinctStep, &'a Decision)>,
    /// Time for one pair of configurations.
    pair: Duration,
}

impl<'a> Tuner<'a> {
    /// Tunes what the steps of plans over `batch` images choose, in about `budget` altogether.
    ///
    /// # Errors
    /// When the device is out of memory.
    pub fn new(device: &'a Device, steps: &'a [DistinctStep], batch: usize, budget: Duration) -> Result<Self> {
        let mut known = HashSet::new();
        let each = steps.iter().flat_map(|step| step.decisions.iter().map(move |decision| (step, decision)));
        let choices: Vec<_> =
            each.filter(|(_, decision)| decision.listed.len() > 1 && known.insert(&decision.choice)).collect();
        let pairs: usize = choices.iter().map(|(_, decision)| decision.listed.len()).sum();
        let pair = budget / u32::try_from(pairs.max(1)).unwrap_or(u32::MAX);
        Ok(Self { device, bench: LayerBench::new(device)?, batch, choices, pair })
    }

    /// How many choices there are.
    pub fn choices(&self) -> usize {
        self.choices.len()
    }

    /// Tunes one choice after the other, and makes the device use what was found; `each` gets every record as it is made.
    ///
    /// # Errors
    /// A device that is no GPU or is lost, a configuration of the engine itself that fails, or of `each`.
    pub fn run(&self, each: &mut dyn FnMut(&TunedRecord) -> Result<()>) -> Result<()> {
        let Device::Gpu(gpu, precision) = self.device else {
            return Err(Error::Config("the CPU has no kernel configurations; tune a GPU".into()));
        };
        for &(step, decision) in &self.choices {
            let one = One { tuner: self, gpu, precision: *precision, step, decision };
            let record = one.tune()?;
            gpu.configurations().tune(decision.choice.clone(), Some(record.tuned.config.clone()));
            self.device.release_idle();
            each(&record)?;
        }
        Ok(())
    }
}

/// One choice.
struct One<'a> {
    tuner: &'a Tuner<'a>,
    gpu: &'a Gpu,
    precision: Dtype,
    step: &'a DistinctStep,
    decision: &'a Decision,
}

impl One<'_> {
    fn tune(&self) -> Result<TunedRecord> {
        let Decision { choice, taken, listed } = self.decision;
        let expected = self.results(taken)?;
        let (mut fastest, mut timed, mut failed) = (taken, 1, Vec::new());
        for name in listed.iter().filter(|name| *name != taken) {
            let outcome = self.results(name).and_then(|got| match difference(&expected, &got, self.precision) {
                Some(difference) => Err(Error::Device(difference)),
                None => self.pair(fastest, name),
            });
            match outcome {
                Ok(times) => {
                    timed += 1;
                    fastest = if is_faster(times) { name } else { fastest };
                }
                Err(lost @ Error::DeviceLost(_)) => return Err(lost),
                Err(error) => failed.push(format!("{name}: {error}")),
            }
        }
        // The last word has the fastest against the engine's own.
        let [chosen_time_us, time_us] = match fastest == taken {
            true => [self.alone(taken)?; 2],
            false => self.pair(taken, fastest)?,
        };
        let (fastest, time_us) = match is_faster([chosen_time_us, time_us]) {
            true => (fastest, time_us),
            false => (taken, chosen_time_us),
        };
        let Choice { kernels, precision, problem } = choice.clone();
        let (config, chosen) = (fastest.clone(), taken.clone());
        let tuned = Tuned { kernels, precision, problem, config, time_us, chosen, chosen_time_us };
        let (step, kind) = (self.step.cost.name.clone(), self.step.cost.kind.clone());
        Ok(TunedRecord { step, kind, tuned, timed, failed })
    }

    /// What the step writes with a configuration, from the same operands every time.
    fn results(&self, name: &str) -> Result<Vec<Vec<f32>>> {
        let Sequence { steps, .. } = &self.step.step;
        let mut run = self.tuner.bench.operands(&self.step.step, self.tuner.batch)?;
        self.with(name, || run.run());
        self.tuner.device.check()?;
        let written = steps.iter().flat_map(|step| step.uses().writes);
        written.map(|id| compared(self.tuner.device, run.buffer(id))).collect()
    }

    /// Does the work with a configuration for this choice.
    fn with(&self, name: &str, work: impl FnOnce()) {
        let configurations = self.gpu.configurations();
        configurations.tune(self.decision.choice.clone(), Some(name.to_owned()));
        work();
        configurations.tune(self.decision.choice.clone(), None);
    }

    /// The step with a configuration, ready to be timed over operands that rotate.
    fn launches<'b>(&'b self, name: &'b str) -> Result<Launches<'b>> {
        let Tuner { device, ref bench, batch, .. } = *self.tuner;
        let bytes = self.step.cost.bytes(batch, self.precision.bytes() as u64);
        let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
        let sets = rotation(device, bytes);
        let operands = (0..sets).map(|_| bench.operands(&self.step.step, batch));
        let mut operands = operands.collect::<Result<Vec<SequenceRun>>>()?;
        Launches::of_bytes(device, sets, bytes, move |set| {
            self.with(name, || operands[set].run());
            Ok(())
        })
    }

    /// Microseconds with two configurations, timed in turns.
    fn pair(&self, first: &str, second: &str) -> Result<[f64; 2]> {
        let mut launches = [self.launches(first)?, self.launches(second)?];
        let mut samples = sample_in_turns(&mut launches, self.tuner.pair).into_iter();
        let mut next = || Ok(median(&samples.next().unwrap_or_else(|| Ok(Vec::new()))?) * 1e6);
        Ok([next()?, next()?])
    }

    /// Microseconds with a configuration, where there is no other to compare it with.
    fn alone(&self, name: &str) -> Result<f64> {
        Ok(median(&self.launches(name)?.sample(self.tuner.pair)?) * 1e6)
    }
}

/// Whether the second of two times is less by more than noise.
fn is_faster([before, after]: [f64; 2]) -> bool {
    after < (1.0 - MARGIN) * before
}

/// The numbers of a result that are compared.
fn compared(device: &Device, result: &Buffer) -> Result<Vec<f32>> {
    let len = result.len();
    if len <= 2 * END {
        let mut all = vec![0.0; len];
        result.read(&mut all)?;
        return Ok(all);
    }
    let (mut part, mut ends) = (device.zeros(2 * END)?, vec![0.0; 2 * END]);
    copy(result.view(0..END), part.view_mut(0..END));
    copy(result.view(len - END..len), part.view_mut(END..2 * END));
    part.read(&mut ends)?;
    Ok(ends)
}

/// How results differ by more than the order of sums explains; `None` where they do not.
fn difference(expected: &[Vec<f32>], got: &[Vec<f32>], precision: Dtype) -> Option<String> {
    let rounding = if precision == Dtype::F32 { 0.0 } else { ROUNDING * precision.epsilon() };
    for (index, (expected, got)) in expected.iter().zip(got).enumerate() {
        let scale = expected.iter().fold(f64::from(f32::MIN_POSITIVE), |most, &v| most.max(f64::from(v).abs()));
        let bound = (ORDER + rounding) * scale;
        // What is no number is apart from all that is not the same.
        let apart = |(a, b): (&f32, &f32)| {
            let distance = f64::from(a - b).abs();
            a.to_bits() != b.to_bits() && (distance.is_nan() || distance > bound)
        };
        if let Some(at) = expected.iter().zip(got).position(apart) {
            let (wanted, got) = (expected[at], got[at]);
            return Some(format!("element {at} of result {index} is {got}, and {wanted} as the engine chooses"));
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_may_differ_by_the_order_of_sums_alone() {
        let expected = vec![vec![1.0, 0.0], vec![-100.0, 3.0]];
        let moved = |by: f32| vec![vec![1.0, 0.0], vec![-100.0, 3.0 + by]];
        assert_eq!(difference(&expected, &moved(0.005), Dtype::F32), None);
        assert!(difference(&expected, &moved(0.02), Dtype::F32).unwrap().contains("element 1 of result 1"));
        assert_eq!(difference(&expected, &moved(0.3), Dtype::F16), None);
        assert!(difference(&expected, &moved(0.6), Dtype::F16).is_some());
        assert!(difference(&expected, &moved(f32::NAN), Dtype::Bf16).is_some());
        let infinite = vec![vec![f32::INFINITY]];
        assert_eq!(difference(&infinite, &infinite.clone(), Dtype::F32), None);
        assert!(difference(&[vec![1.0]], &infinite, Dtype::F32).is_some());
    }
}
