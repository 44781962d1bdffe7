//! Files of tuned configurations: what was fastest on a device, problem by problem.
//!
//! A GPU that is opened takes those of its own file, which lies beside the cached kernels and which `bench kernels --tune` writes.
//! `$DEPTHSHRINKER_TUNED` names another file, or `none`. A configuration decides in which order sums are taken, so results
//! repeat bit by bit only with the same file. An emulator takes none but the one that is named.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cache::Cache;
use super::configurations::Choice;
use super::driver::Driver;
use super::gpu::Gpu;
use super::source::Unit;
use crate::dtype::Dtype;
use crate::{Error, Result, files};

/// The variable that names a file, or [`NONE`].
pub const VARIABLE: &str = "DEPTHSHRINKER_TUNED";
/// What the variable says where engines are to choose.
const NONE: &str = "none";
/// Version of the format.
const SCHEMA: u32 = 1;

/// What was fastest for one choice.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tuned {
    /// The kernels, such as `pointwise_forward`.
    pub kernels: String,
    /// The type of activations.
    pub precision: Dtype,
    /// Everything that the problem says of itself.
    pub problem: String,
    /// The configuration that took the least time.
    pub config: String,
    /// Microseconds of the step with it.
    pub time_us: f64,
    /// The configuration that the engine chooses.
    pub chosen: String,
    /// Microseconds of the step with that.
    pub chosen_time_us: f64,
}

impl Tuned {
    /// The choice that it answers.
    pub fn choice(&self) -> Choice {
        let Self { kernels, precision, problem, .. } = self;
        Choice { kernels: kernels.clone(), precision: *precision, problem: problem.clone() }
    }
}

/// What a file holds.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TunedFile {
    schema: u32,
    /// Name of the device.
    device: String,
    /// Its compute capability times ten.
    arch: u32,
    /// A hash of all kernels: others have other times.
    kernels: String,
    /// A row for each choice.
    configurations: Vec<Tuned>,
}

impl TunedFile {
    /// A file of a device without rows.
    ///
    /// # Errors
    /// Kernels that cannot be read.
    pub fn new(driver: &dyn Driver) -> Result<Self> {
        let (device, arch) = (driver.name(), driver.arch());
        Ok(Self { schema: SCHEMA, device, arch, kernels: kernels_hash()?, configurations: Vec::new() })
    }

    /// Reads a file.
    ///
    /// # Errors
    /// A file that cannot be read, or is none of these.
    pub fn read(path: &Path) -> Result<Self> {
        let text = files::read_text(path)?;
        serde_json::from_str(&text).map_err(|e| Error::file(path, format!("is no file of tuned configurations ({e})")))
    }

    /// The rows.
    pub fn configurations(&self) -> &[Tuned] {
        &self.configurations
    }

    /// Adds a row, in the place of another one for the same choice.
    pub fn add(&mut self, tuned: Tuned) {
        let choice = tuned.choice();
        match self.configurations.iter_mut().find(|known| known.choice() == choice) {
            Some(known) => *known = tuned,
            None => self.configurations.push(tuned),
        }
    }

    /// Why it says nothing of a device; `None` where it does.
    ///
    /// # Errors
    /// Kernels that cannot be read.
    pub fn strange_to(&self, driver: &dyn Driver) -> Result<Option<String>> {
        let own = Self::new(driver)?;
        Ok(if self.schema != own.schema {
            Some(format!("has the format {}, and this version reads {}", self.schema, own.schema))
        } else if (&self.device, self.arch) != (&own.device, own.arch) {
            Some(format!("is of {} (sm_{}), not of {} (sm_{})", self.device, self.arch, own.device, own.arch))
        } else if self.kernels != own.kernels {
            Some("is of other kernels than this version's".to_owned())
        } else {
            None
        })
    }
}

/// Where the tuned configurations of a device lie; `None` where there are to be none.
pub fn path(driver: &dyn Driver, cache: &Cache) -> Option<PathBuf> {
    match std::env::var_os(VARIABLE).filter(|named| !named.is_empty()) {
        Some(named) if named == NONE => None,
        Some(named) => Some(named.into()),
        // How long an emulator takes says nothing.
        None if driver.is_emulated() => None,
        None => {
            let of = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
            let name: String = driver.name().chars().map(of).collect();
            Some(cache.folder().join(format!("tuned-{name}-sm_{}.json", driver.arch())))
        }
    }
}

/// Makes a GPU use its tuned configurations, where it has any.
///
/// # Errors
/// A named file that cannot be read or is of another device or of other kernels. One that lies in the cache and does not
/// fit is left alone, and one that is named and not there is none; a line says so.
pub fn adopt(gpu: &Gpu, cache: &Cache) -> Result<()> {
    let Some(path) = path(gpu.driver(), cache) else { return Ok(()) };
    let is_named = std::env::var_os(VARIABLE).is_some_and(|named| !named.is_empty());
    if !path.exists() {
        // No error, since the tuner may be about to write it.
        if is_named {
            tracing::warn!("{}: no such file; kernels are configured as without it", path.display());
        }
        return Ok(());
    }
    let read = TunedFile::read(&path).and_then(|file| match file.strange_to(gpu.driver())? {
        Some(problem) => Err(Error::file(&path, format!("{problem}; run `bench kernels --tune` again"))),
        None => Ok(file),
    });
    match read {
        Err(error) if is_named => return Err(error),
        Err(error) => tracing::warn!("{error}; kernels are configured as without it"),
        Ok(file) => {
            for tuned in file.configurations {
                gpu.configurations().tune(tuned.choice(), Some(tuned.config));
            }
            tracing::debug!("{} tuned configurations from {}", gpu.configurations().tuned(), path.display());
        }
    }
    Ok(())
}

/// A hash of all kernels and of what they include.
fn kernels_hash() -> Result<String> {
    let mut hash = Sha256::new();
    for unit in Unit::all()? {
        hash.update(unit.key(&[]));
    }
    Ok(hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::dry_run::DryRun;

    fn row(config: &str) -> Tuned {
        let (kernels, problem, chosen) = ("pointwise_forward".into(), "p".into(), "64x64-vector".into());
        let (precision, config) = (Dtype::F16, config.into());
        Tuned { kernels, precision, problem, config, time_us: 1.5, chosen, chosen_time_us: 2.0 }
    }

    #[test]
    fn a_file_reads_back_and_has_a_row_for_each_choice() {
        let driver = DryRun::new(80);
        let mut file = TunedFile::new(&driver).unwrap();
        file.add(row("128x32-vector"));
        file.add(row("128x128-vector"));
        file.add(Tuned { precision: Dtype::Bf16, ..row("64x64-vector") });
        assert_eq!(
            file.configurations().iter().map(|row| &row.config[..]).collect::<Vec<_>>(),
            ["128x128-vector", "64x64-vector"]
        );
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("tuned.json");
        std::fs::write(&path, serde_json::to_string(&file).unwrap()).unwrap();
        assert_eq!(TunedFile::read(&path).unwrap(), file);
        assert_eq!(file.strange_to(&driver).unwrap(), None);
    }

    #[test]
    fn what_is_of_something_else_is_told() {
        let file = TunedFile::new(&DryRun::new(80)).unwrap();
        let told = |file: &TunedFile, arch| file.strange_to(&DryRun::new(arch)).unwrap().unwrap();
        assert!(told(&file, 70).contains("(sm_80), not of"));
        assert!(told(&TunedFile { kernels: String::new(), ..file.clone() }, 80).contains("other kernels"));
        assert!(told(&TunedFile { schema: 7, ..file }, 80).contains("format 7"));
    }
}
