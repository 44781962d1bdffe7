//! The text of `kernels/`, embedded by the build script.

use std::path::Path;

use sha2::{Digest, Sha256};

use crate::dtype::Dtype;
use crate::{Error, Result};

/// One file of `kernels/`.
#[derive(Debug)]
pub struct SourceFile {
    /// Its path below `kernels/`.
    pub name: &'static str,
    /// Its text.
    pub text: &'static str,
    /// The `__global__` functions it defines.
    pub kernels: &'static [&'static str],
    /// The instances of them that exist, as name expressions.
    pub instances: &'static [&'static str],
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// What is compiled together: the instances of one file for one element type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Unit {
    /// Index of the file in [`FILES`].
    file: usize,
    /// The narrowest type among an instance's template arguments.
    dtype: Dtype,
}

impl Unit {
    /// All units.
    pub fn all() -> Vec<Self> {
        let of_file = |file: usize| Dtype::ALL.into_iter().map(move |dtype| Self { file, dtype });
        (0..FILES.len()).flat_map(of_file).filter(|unit| unit.instances().next().is_some()).collect()
    }

    /// The unit that an instance belongs to.
    ///
    /// # Errors
    /// When no file has it.
    pub fn of(instance: &str) -> Result<Self> {
        let file = FILES.iter().position(|file| file.instances.contains(&instance));
        let file = file.ok_or_else(|| Error::Device(format!("there is no kernel {instance}")))?;
        Ok(Self { file, dtype: dtype_of(instance) })
    }

    /// The file.
    pub fn file(&self) -> &'static SourceFile {
        &FILES[self.file]
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Name expressions of its instances.
    pub fn instances(self) -> impl Iterator<Item = &'static str> {
        let dtype = self.dtype();
        self.file().instances.iter().copied().filter(move |instance| dtype_of(instance) == dtype)
    }

    /// A hash of the file, of all headers and of what else decides the result.
    pub fn key(&self, options: &[&str]) -> String {
        let mut hash = Sha256::new();
        let mut part = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        for file in FILES.iter().filter(|file| file.name == self.file().name || file.kernels.is_empty()) {
            part(file.name);
            part(file.text);
        }
        self.instances().for_each(&mut part);
        options.iter().for_each(|option| part(option));
        hash.finalize().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
    }
}

impl std::fmt::Display for Unit {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} {}", self.file().name, self.dtype())
    }
}

/// The element type that an instance needs its device to have.
fn dtype_of(instance: &str) -> Dtype {
    let arguments = instance.split_once('<').map_or("", |(_, arguments)| arguments);
    let mut names = arguments.split(|c: char| !c.is_ascii_alphanumeric());
    match names.clone().any(|name| name == "bf16") {
        true => Dtype::Bf16,
        false if names.any(|name| name == "f16") => Dtype::F16,
        false => Dtype::F32,
    }
}

/// Writes all files below a folder, for a compiler that reads files.
pub(super) fn write_all(folder: &Path) -> Result<()> {
    std::fs::create_dir_all(folder.join("emulator")).map_err(|e| Error::io(folder, e))?;
    for file in FILES {
        let path = folder.join(file.name);
        std::fs::write(&path, file.text).map_err(|e| Error::io(&path, e))?;
    }
    Ok(())
}
