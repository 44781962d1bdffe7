//! The text of `kernels/`: embedded by the build script, or read from `$DEPTHSHRINKER_KERNEL_SOURCES` while kernels are
//! worked on, so that editing one builds nothing anew.

use std::borrow::Cow;
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use sha2::{Digest, Sha256};

use super::scan::{Fault, KernelFunction, head, list, scan};
use crate::dtype::Dtype;
use crate::{Error, Result};

/// Names a folder that is read in the place of the embedded text.
const SOURCES: &str = "DEPTHSHRINKER_KERNEL_SOURCES";

/// One file of `kernels/`.
#[derive(Debug)]
pub struct SourceFile {
    /// Its path below `kernels/`.
    pub name: Cow<'static, str>,
    /// Its text.
    pub text: Cow<'static, str>,
    /// The `__global__` functions it defines.
    pub kernels: Vec<KernelFunction>,
    /// The instances of them that exist, as name expressions.
    pub instances: Vec<String>,
}

include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// A file that cannot be used, and why: an [`Error`] cannot be told twice.
type Unusable = (PathBuf, String);

static FILES: LazyLock<std::result::Result<Vec<SourceFile>, Unusable>> =
    LazyLock::new(|| match std::env::var_os(SOURCES).filter(|folder| !folder.is_empty()) {
        Some(folder) => read(Path::new(&folder)),
        None => EMBEDDED
            .iter()
            .map(|&(name, text)| {
                SourceFile::new(name.into(), text.into()).map_err(|fault| (name.into(), fault.to_string()))
            })
            .collect(),
    });

/// Every file of `kernels/`, by name.
///
/// # Errors
/// A folder or file that `$DEPTHSHRINKER_KERNEL_SOURCES` names and that cannot be read, or a kernel in it that is not
/// written as the others are: file and line are told.
pub fn files() -> Result<&'static [SourceFile]> {
    match &*FILES {
        Ok(files) => Ok(files),
        Err((path, problem)) => Err(Error::file(path, format!("{problem} (named by {SOURCES})"))),
    }
}

fn read(folder: &Path) -> std::result::Result<Vec<SourceFile>, Unusable> {
    let unreadable = |path: &Path| {
        let path = path.to_owned();
        |e: std::io::Error| (path, format!("cannot be read: {e}"))
    };
    let names = list(folder).map_err(unreadable(folder))?;
    let file = |name: String| {
        let path = folder.join(&name);
        let text = std::fs::read_to_string(&path).map_err(unreadable(&path))?;
        SourceFile::new(name.into(), text.into()).map_err(|fault| (path, fault.to_string()))
    };
    names.into_iter().map(file).collect()
}

impl SourceFile {
    fn new(name: Cow<'static, str>, text: Cow<'static, str>) -> std::result::Result<Self, Fault> {
        let scan = scan(&name, &text)?;
        Ok(Self { name, text, kernels: scan.kernels, instances: scan.instances })
    }

    /// The kernel that an instance of this file is of.
    pub fn kernel(&self, instance: &str) -> &KernelFunction {
        let found = self.kernels.iter().find(|kernel| kernel.name == head(instance));
        found.expect("a scanned file has a kernel for every instance")
    }
}

/// What is compiled together: the instances of one file for one element type.
#[derive(Debug, Clone, Copy)]
pub struct Unit {
    file: &'static SourceFile,
    /// The narrowest type among an instance's template arguments.
    dtype: Dtype,
}

impl Unit {
    /// All units.
    ///
    /// # Errors
    /// As [`files`].
    pub fn all() -> Result<Vec<Self>> {
        let of_file = |file| Dtype::ALL.into_iter().map(move |dtype| Self { file, dtype });
        Ok(files()?.iter().flat_map(of_file).filter(|unit| unit.instances().next().is_some()).collect())
    }

    /// The unit that an instance belongs to.
    ///
    /// # Errors
    /// When no file has it; as [`files`].
    pub fn of(instance: &str) -> Result<Self> {
        let file = files()?.iter().find(|file| file.instances.iter().any(|i| i == instance));
        let file = file.ok_or_else(|| Error::Device(format!("there is no kernel {instance}")))?;
        Ok(Self { file, dtype: dtype_of(instance) })
    }

    /// The file.
    pub fn file(&self) -> &'static SourceFile {
        self.file
    }

    /// The element type.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Name expressions of its instances.
    pub fn instances(self) -> impl Iterator<Item = &'static str> {
        let dtype = self.dtype();
        self.file.instances.iter().map(String::as_str).filter(move |instance| dtype_of(instance) == dtype)
    }

    /// A hash of the file, of all headers and of what else decides the result.
    pub fn key(&self, options: &[&str]) -> String {
        let mut hash = Sha256::new();
        let mut part = |text: &str| {
            hash.update((text.len() as u64).to_le_bytes());
            hash.update(text);
        };
        let all = files().expect("files were read before there was a unit");
        for file in all.iter().filter(|file| file.name == self.file.name || file.kernels.is_empty()) {
            part(&file.name);
            part(&file.text);
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
    for file in files()? {
        let path = folder.join(&*file.name);
        std::fs::write(&path, &*file.text).map_err(|e| Error::io(&path, e))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_takes_the_place_of_what_is_embedded() {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("emulator")).unwrap();
        for (name, text) in EMBEDDED {
            std::fs::write(folder.path().join(name), text.replace("a += b", "a += 2·b")).unwrap();
        }
        let files = read(folder.path()).unwrap();
        assert_eq!(
            files.iter().map(|file| &*file.name).collect::<Vec<_>>(),
            EMBEDDED.iter().map(|f| f.0).collect::<Vec<_>>()
        );
        let changed = files.iter().find(|file| file.name == "elementwise.cu").unwrap();
        assert!(changed.text.contains("a += 2·b"));

        let path = folder.path().join("pool.cu");
        std::fs::write(&path, "\n__global__ void pool(int n) {}\n").unwrap();
        let (named, problem) = read(folder.path()).unwrap_err();
        assert_eq!((named, problem.as_str()), (path, "line 2: no `// instances:` line names pool"));
        assert_eq!(read(&folder.path().join("none")).unwrap_err().0, folder.path().join("none"));
    }

    #[test]
    fn every_kernel_that_is_embedded_has_a_signature() {
        for file in files().unwrap() {
            for instance in &file.instances {
                let kernel = file.kernel(instance);
                assert!(!kernel.parameters.is_empty(), "{instance}");
            }
        }
    }
}
