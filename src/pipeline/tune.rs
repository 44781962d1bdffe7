//! `bench kernels --tune`: the fastest configurations of a network's kernels, kept where the engine finds them.

use std::path::PathBuf;
use std::time::Duration;

use crate::device::cache::Cache;
use crate::device::tuned::{self, TunedFile};
use crate::device::{Device, gpu::Gpu};
use crate::engine::Fusion;
use crate::io::write_atomic;
use crate::measure::{NetworkCase, TunedRecord, Tuner, distinct_steps};
use crate::ops::config::KernelTarget;
use crate::train::Reporter;
use crate::{Error, Result};

/// What was tuned.
#[derive(Debug, Clone, PartialEq)]
pub struct Tuning {
    /// A record of each choice, in the order of the steps.
    pub records: Vec<TunedRecord>,
    /// The file that has them.
    pub path: PathBuf,
}

/// Tunes the kernels of all cases that run fused, as the engine runs them, in about `budget`; with `layer` only those of steps whose
/// name contains it. Every result is in the file of the
/// device as soon as there is one, and the device uses it from then on.
///
/// # Errors
/// A device that is no GPU or fails, an emulator where no file is named, no such step, or a file that cannot be written.
pub fn tune(
    device: &Device,
    cases: &[NetworkCase],
    batch: usize,
    layer: Option<&str>,
    budget: Duration,
    reporter: &mut Reporter,
) -> Result<Tuning> {
    let Device::Gpu(gpu, precision) = device else {
        return Err(Error::Config("the CPU has no kernel configurations; give --device cuda".into()));
    };
    let (path, mut file) = file_of(gpu)?;
    let on = KernelTarget::of(gpu, *precision);
    let mut steps = Vec::new();
    for case in cases.iter().filter(|case| case.fusion == Fusion::OnLoad) {
        let (graph, plan) = case.planned(on)?;
        steps.extend(distinct_steps(&graph, plan, batch, *precision, on.arch)?);
    }
    if let Some(name) = layer {
        steps.retain(|step| step.cost.name.contains(name));
        if steps.is_empty() {
            return Err(Error::Config(format!("no step has {name:?} in its name; `plan` prints their names")));
        }
    }
    let tuner = Tuner::new(device, &steps, batch, budget)?;
    reporter.begin("tune", 0, tuner.choices() as u64);
    let mut records = Vec::with_capacity(tuner.choices());
    let outcome = tuner.run(&mut |record| {
        for failure in &record.failed {
            tracing::warn!("{} of {}: {failure}", record.tuned.kernels, record.step);
        }
        file.add(record.tuned.clone());
        let text = serde_json::to_string_pretty(&file).expect("rows of numbers and names");
        write_atomic(&path, |out| writeln!(out, "{text}"))?;
        records.push(record.clone());
        reporter.step(records.len() as u64, &record.tuned.kernels);
        Ok(())
    });
    reporter.end();
    outcome.map(|()| Tuning { records, path })
}

/// The file of a device, with the rows that it has already.
fn file_of(gpu: &Gpu) -> Result<(PathBuf, TunedFile)> {
    let (driver, cache) = (gpu.driver(), Cache::of_user());
    let path = tuned::path(driver, &cache).ok_or_else(|| {
        let why =
            if driver.is_emulated() { "times of an emulator say nothing of a GPU" } else { "no file is to be used" };
        Error::Config(format!("{why}; name a file in {}", tuned::VARIABLE))
    })?;
    if path.is_file() {
        let file = TunedFile::read(&path)?;
        if file.strange_to(driver)?.is_none() {
            return Ok((path, file));
        }
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
    }
    Ok((path, TunedFile::new(driver)?))
}
