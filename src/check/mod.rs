//! The operation table: one list of cases that runs on any device and is compared with the host.
//!
//! `depthshrinker check` runs it on the user's GPU and the tests run it on the emulator, while `tests/ops.rs` checks the
//! host's own operations on the same rows against a seven-loop reference in `f64`. Inputs are rounded to the device's
//! precision before either side sees them, so that only sums and the rounding of results may differ.

mod conv;
mod inverted_residual;
mod norm;
mod on_load;
mod small;
pub mod training;

pub use conv::{CONVOLUTIONS, ConvRow, problem};
pub use inverted_residual::{BLOCKS, BlockData, BlockRow};
pub use norm::{NORMS, NormRow};

use serde::Serialize;

use crate::device::counters::{CounterLog, Counters, DistinctBytes, LaunchCounters};
use crate::device::{Buffer, Device};
use crate::dtype::Dtype;
use crate::engine::SequenceRun;
use crate::ops::step::ValueId;
use crate::{Error, Result};

/// Runs a case on one device.
type Run = dyn Fn(&On<'_>) -> Result<Vec<Output>> + Send + Sync;

/// A case of the table.
pub struct Case {
    /// Operation, shape, and what is looked at.
    pub name: String,
    run: Box<Run>,
}

/// One tensor that a case gives.
pub struct Output {
    name: &'static str,
    values: Vec<f32>,
    /// Length of the sums behind it.
    terms: usize,
    /// Roundings to the device's precision that it saw, in units of its largest value.
    roundings: f64,
}

/// A device, and the precision that inputs are rounded to: that of the device which is checked.
pub struct On<'a> {
    device: &'a Device,
    inputs: Dtype,
}

impl Case {
    fn new(name: String, run: impl Fn(&On<'_>) -> Result<Vec<Output>> + Send + Sync + 'static) -> Self {
        Self { name, run: Box::new(run) }
    }

    /// Runs the case once on a device and once on the host, and returns the differences.
    ///
    /// # Errors
    /// A device that fails.
    pub fn compare(&self, device: &Device) -> Result<std::result::Result<(), String>> {
        Ok(self.compared(device)?.map(drop))
    }

    /// The same with two runs on the device, which agree to the bit.
    ///
    /// # Errors
    /// A device that fails.
    pub fn compare_twice(&self, device: &Device) -> Result<std::result::Result<(), String>> {
        let first = match self.compared(device)? {
            Ok(outputs) => outputs,
            Err(difference) => return Ok(Err(difference)),
        };
        let again = (self.run)(&On { device, inputs: device.precision() })?;
        Ok(first.iter().zip(&again).try_for_each(|(first, again)| first.repeats(again)))
    }

    /// What a run on the device gives, if it is what the host gives.
    fn compared(&self, device: &Device) -> Result<std::result::Result<Vec<Output>, String>> {
        let inputs = device.precision();
        let expected = (self.run)(&On { device: &Device::Cpu, inputs })?;
        let got = (self.run)(&On { device, inputs })?;
        let differences = got.iter().zip(&expected).try_for_each(|(got, expected)| got.compare(expected, inputs));
        Ok(differences.map(|()| got))
    }
}

impl Output {
    /// A result in the device's precision, of sums of `terms` terms.
    fn rounded(name: &'static str, values: Vec<f32>, terms: usize) -> Self {
        Self::derived(name, values, terms, 1.0)
    }

    /// A result whose terms were rounded to the device's precision before they were summed.
    fn derived(name: &'static str, values: Vec<f32>, terms: usize, roundings: f64) -> Self {
        Self { name, values, terms, roundings }
    }

    /// A result in `f32`.
    fn float(name: &'static str, values: Vec<f32>, terms: usize) -> Self {
        Self::derived(name, values, terms, 0.0)
    }

    fn repeats(&self, again: &Self) -> std::result::Result<(), String> {
        match self.values.iter().zip(&again.values).position(|(a, b)| a.to_bits() != b.to_bits()) {
            Some(at) => Err(format!("{}: element {at} differs between two runs", self.name)),
            None => Ok(()),
        }
    }

    fn compare(&self, expected: &Self, dtype: Dtype) -> std::result::Result<(), String> {
        let mut tolerance = 1e-6 * (self.terms as f64).sqrt() + 4e-6;
        if dtype != Dtype::F32 {
            // Half a unit in the last place of the largest value, and as much again for a result on the other side.
            tolerance += self.roundings * dtype.epsilon();
        }
        if self.values.len() != expected.values.len() {
            return Err(format!("{}: {} elements, expected {}", self.name, self.values.len(), expected.values.len()));
        }
        let scale = expected.values.iter().fold(1e-3f64, |m, &v| m.max(f64::from(v).abs()));
        let distance = |(&a, &b): (&f32, &f32)| if a.is_finite() { f64::from(a - b).abs() } else { f64::INFINITY };
        let (at, worst) = self
            .values
            .iter()
            .zip(&expected.values)
            .map(distance)
            .enumerate()
            .fold((0, 0.0), |a, b| if b.1 > a.1 { b } else { a });
        if worst <= tolerance * scale {
            return Ok(());
        }
        let (got, wanted) = (self.values[at], expected.values[at]);
        Err(format!(
            "{}: element {at} is {got}, expected {wanted} (scale {scale:.3}, tolerance {tolerance:.1e})",
            self.name
        ))
    }
}

impl On<'_> {
    /// Numbers in -1..1 that follow from the seed, rounded to the precision that is checked.
    fn numbers(&self, seed: u64, len: usize) -> Vec<f32> {
        self.round(numbers(seed, len))
    }

    fn round(&self, mut values: Vec<f32>) -> Vec<f32> {
        let bytes = self.inputs.encode(&values);
        self.inputs.decode(&bytes, &mut values);
        values
    }

    /// An activation or a weight on the device.
    fn put(&self, values: &[f32]) -> Result<Buffer> {
        let mut buffer = self.device.activations(values.len())?;
        buffer.write(values)?;
        Ok(buffer)
    }

    /// A parameter on the device.
    fn put_float(&self, values: &[f32]) -> Result<Buffer> {
        self.device.upload(values)
    }

    /// Memory for a result, filled with what no result is.
    fn room(&self, len: usize) -> Result<Buffer> {
        self.put(&vec![f32::NAN; len])
    }

    /// Sets a value of a run, where a step uses it.
    fn set(&self, run: &mut SequenceRun, id: ValueId, values: impl FnOnce(usize) -> Vec<f32>) -> Result<()> {
        run.buffer_mut(id).map_or(Ok(()), |buffer| buffer.write(&values(buffer.len())))
    }

    /// Fills an activation or a weight of a run with [`numbers`](Self::numbers).
    fn fill(&self, run: &mut SequenceRun, id: ValueId, seed: u64) -> Result<()> {
        self.set(run, id, |len| self.numbers(seed, len))
    }

    /// Fills a parameter of a run, which no device rounds.
    fn fill_floats(&self, run: &mut SequenceRun, id: ValueId, seed: u64) -> Result<()> {
        self.set(run, id, |len| numbers(seed, len))
    }

    /// Fills a value that is to be written with what no result is.
    fn spoil(&self, run: &mut SequenceRun, id: ValueId) -> Result<()> {
        self.set(run, id, |len| vec![f32::NAN; len])
    }

    fn get(&self, buffer: &Buffer) -> Result<Vec<f32>> {
        let mut values = vec![0.0; buffer.len()];
        buffer.read(&mut values)?;
        Ok(values)
    }
}

/// Numbers in -1..1 that are a function of a seed alone, none of them tiny.
pub fn numbers(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let value = (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0;
            if value.abs() < 1e-3 { 0.5 } else { value }
        })
        .collect()
}

/// All cases.
pub fn cases() -> Vec<Case> {
    let mut cases: Vec<Case> = CONVOLUTIONS.iter().flat_map(conv::cases).collect();
    cases.extend(CONVOLUTIONS.iter().map(|row| on_load::case(problem(row))));
    cases.extend(NORMS.iter().flat_map(norm::cases));
    cases.extend(inverted_residual::cases());
    cases.extend(small::cases());
    cases.extend(training::cases());
    cases
}

/// What came of a case on a device.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Row {
    /// The device's.
    pub precision: Dtype,
    /// The case's.
    pub name: String,
    /// What differs from the host, or how the device failed.
    pub difference: Option<String>,
    /// What the launches of one run did, where the device counts.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub counters: Option<CaseCounters>,
}

/// What all launches of a case did, together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct CaseCounters {
    /// Launches.
    pub launches: usize,
    /// What was counted.
    #[serde(flatten)]
    pub counters: Counters,
    /// Bytes that they touched, each launch for itself.
    pub distinct: DistinctBytes,
    /// Bytes that they moved, in sectors.
    pub moved_bytes: u64,
    /// Fewest sectors over those moved; null where nothing was.
    pub sector_efficiency: Option<f64>,
    /// Wavefronts over those without conflicts; null without shared memory.
    pub wavefront_ratio: Option<f64>,
    /// Mean lanes of a request.
    pub active_lanes: Option<f64>,
}

impl CaseCounters {
    fn new(launches: &[LaunchCounters]) -> Self {
        let (mut counters, mut distinct) = (Counters::default(), DistinctBytes::default());
        for launch in launches {
            counters.add(&launch.counters, 1);
            let touched = launch.touched.unwrap_or_default();
            distinct.read += touched.operands.read + touched.workspace.read;
            distinct.written += touched.operands.written + touched.workspace.written;
        }
        Self {
            launches: launches.len(),
            counters,
            distinct,
            moved_bytes: counters.moved_bytes(),
            sector_efficiency: counters.sector_efficiency(),
            wavefront_ratio: counters.wavefront_ratio(),
            active_lanes: counters.active_lanes(),
        }
    }
}

/// Compares all `wanted` cases, and reports differences as it goes. A case on which the device fails is one that differs,
/// and the rest goes on; after one that loses the device nothing can. Where the device counts into `log`, each case runs once
/// and has its counts.
pub fn compare_all(device: &Device, wanted: impl Fn(&Case) -> bool, log: Option<&CounterLog>) -> Vec<Row> {
    let precision = device.precision();
    let mut lost = None;
    let compared = cases().into_iter().filter(wanted).map(|case| {
        let difference = match &lost {
            Some(by) => Some(format!("not run: {by} lost the device")),
            None => match if log.is_some() { case.compare(device) } else { case.compare_twice(device) } {
                Ok(outcome) => outcome.err(),
                Err(error) => {
                    if matches!(error, Error::DeviceLost(_)) {
                        lost = Some(case.name.clone());
                    }
                    Some(error.to_string())
                }
            },
        };
        if let Some(difference) = &difference {
            tracing::error!("{precision}/{}: {difference}", case.name);
        }
        let counters = log.map(|log| CaseCounters::new(&log.take()));
        Row { precision, name: case.name, difference, counters }
    });
    compared.collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dtype::Dtype;
    use crate::ops::batch_norm::BatchNormProblem;
    use crate::ops::config::{
        AugmentProblem, BetweenNorms, BiasProblem, GemmProblem, GlobalPoolProblem, KernelFamily, KernelPass,
        KernelTarget, OptimizerProblem, Problem, WalkProblem, specialised,
    };
    use crate::ops::conv::ConvFamily;
    use crate::ops::pad::PadProblem;
    use crate::ops::pool::PoolProblem;
    use crate::shape::{Lines, Shape, Window};

    fn target(dtype: Dtype) -> KernelTarget {
        KernelTarget { dtype, arch: 80 }
    }

    /// Every listed configuration serves, reads back from its name, and has a name of its own; the chosen one is listed.
    fn is_whole<P: Problem>(problem: &P, passes: &[KernelPass]) {
        for (&pass, dtype) in passes.iter().flat_map(|pass| Dtype::ALL.map(|dtype| (pass, dtype))) {
            let (on, all) = (target(dtype), problem.list(pass, target(dtype)));
            assert!(all.contains(&problem.choose(pass, on)), "{pass:?} {dtype}: {all:?}");
            for config in &all {
                problem.check(*config, pass, on).unwrap();
                assert_eq!(config.to_string().parse::<P::Config>().unwrap(), *config);
            }
            let mut names: Vec<String> = all.iter().map(P::Config::to_string).collect();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), all.len(), "{names:?}");
        }
    }

    const CONV_PASSES: [KernelPass; 3] = [KernelPass::Forward, KernelPass::InputGradient, KernelPass::WeightGradient];
    const BOTH: [KernelPass; 2] = [KernelPass::Forward, KernelPass::Backward];

    #[test]
    fn configurations_are_listed_with_the_chosen_one_and_read_back() {
        for row in CONVOLUTIONS {
            let p = problem(row);
            is_whole(&p, &CONV_PASSES);
            if p.family() == ConvFamily::Depthwise && specialised(&p).is_some() {
                is_whole(&BetweenNorms(p), &BOTH);
            }
            is_whole(&BiasProblem { pixels: p.n * p.output.pixels(), c: p.output.c }, &[KernelPass::WeightGradient]);
        }
        is_whole(&GemmProblem::product(130, 64, 16), &CONV_PASSES);
        for row in NORMS {
            let shape = Lines { lines: row.0, w: row.1, c: row.2 };
            is_whole(&BatchNormProblem { shape, eps: 1e-5, momentum: 0.1 }, &BOTH);
        }
        is_whole(&GlobalPoolProblem { n: 3, pixels: 20, c: 24 }, &BOTH);
        let (input, output) = (Shape::new(9, 7, 13), Shape::new(5, 4, 13));
        is_whole(&PoolProblem { n: 2, input, output, window: Window::square(3, 2, 1) }, &BOTH);
        let pad = PadProblem { n: 2, input, output, top: -2, left: 0 };
        is_whole(&pad, &[KernelPass::Forward]);
        for family in [KernelFamily::Elementwise, KernelFamily::Activation, KernelFamily::Dropout] {
            for len in [1, 5000, 70_001, 30_000_000] {
                is_whole(&WalkProblem { family, len, aligned: true }, &BOTH);
            }
        }
        is_whole(&WalkProblem { family: KernelFamily::Elementwise, len: 999, aligned: false }, &[KernelPass::Forward]);
        is_whole(&OptimizerProblem { len: 100_000 }, &[KernelPass::Forward]);
        is_whole(&AugmentProblem { n: 4, len: 288 }, &[KernelPass::Forward]);
    }
}
