//! Compiles units to cubins, from the cache or through NVRTC, and reads the assembler's report on each kernel. Where the
//! GPU is newer than NVRTC they are PTX, which the driver compiles.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::cache::Cache;
use super::nvrtc::{Nvrtc, Target, options};
use super::source::Unit;
use crate::dtype::Dtype;
use crate::{Error, Result};

/// Architectures that are compiled and checked for: V100, T4, A100, RTX 30, H100.
pub const ARCHITECTURES: [u32; 5] = [70, 75, 80, 86, 90];

/// A unit ready to be loaded.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// What it was compiled to.
    pub target: Target,
    /// The cubin, or PTX that ends in a zero byte.
    pub image: Vec<u8>,
    /// Its kernels.
    pub kernels: Vec<CompiledKernel>,
    /// Whether the cache keeps it.
    pub kept: bool,
}

/// One kernel of a unit. PTX says nothing of registers, memory and spills: they are 0.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CompiledKernel {
    /// Its name expression.
    pub instance: String,
    /// Its name in the image.
    pub symbol: String,
    /// Registers per thread.
    pub registers: u32,
    /// Bytes of local memory per thread, spills included.
    pub stack: u32,
    /// Bytes of spill stores and loads.
    pub spills: u32,
    /// Bytes of static shared memory per block.
    pub shared: u32,
}

/// Whether an architecture computes in a type: bf16 needs sm_80.
pub fn supported(dtype: Dtype, arch: u32) -> bool {
    dtype != Dtype::Bf16 || arch >= 80
}

/// Refuses a type that an architecture does not have.
///
/// # Errors
/// Says which types it has.
pub fn require(dtype: Dtype, arch: u32) -> Result<()> {
    if supported(dtype, arch) {
        return Ok(());
    }
    Err(Error::Device(format!("sm_{arch} has no {dtype}; use --precision f16 or f32")))
}

/// Virtual architectures whose PTX may have been brought along, from the newest that compilers know.
const VIRTUAL: [u32; 11] = [121, 120, 110, 103, 100, 90, 89, 87, 86, 80, 75];

/// Compiles a unit, or takes it from the cache. One that was brought along (`$DEPTHSHRINKER_KERNELS`) serves whatever
/// version of the compiler made it, and for an older architecture of the same generation too, as PTX of any older one does;
/// without a compiler, so does any in the cache. A compiler that is older than the architecture makes PTX.
///
/// # Errors
/// When it is in no cache and there is no compiler, or the compiler refuses.
pub fn compile(unit: Unit, arch: u32, cache: &Cache) -> Result<Compiled> {
    require(unit.dtype(), arch)?;
    let found = |of: &dyn Fn(&str) -> Option<PathBuf>| {
        any_name(unit, arch).find_map(|(target, name)| Some((target, of(&name)?)))
    };
    if let Some((target, path)) = found(&|name| cache.brought(name)) {
        return read(&path, target, true);
    }
    let nvrtc = match Nvrtc::find() {
        Ok(nvrtc) => nvrtc,
        Err(error) => {
            return match found(&|name| cache.find(name)) {
                Some((target, path)) => read(&path, target, true),
                None => Err(without_kernels(error, arch, cache)),
            };
        }
    };
    let target = nvrtc.target(arch)?;
    let name = name(unit, target, &key(unit, target), nvrtc.version());
    let made = || {
        let entry = cache.entry(&name, |path| {
            let code = nvrtc.compile(unit, target)?;
            write(path, &resources(&code.names, &code.log), &code.image)
        })?;
        read(entry.path(), target, entry.is_kept())
    };
    made().or_else(|error| match error {
        // A file that was cut short, by a power failure say, is made again.
        Error::File { path, .. } if std::fs::remove_file(&path).is_ok() => made(),
        other => Err(other),
    })
}

/// What the content of a unit's file follows from, the version of the compiler aside.
fn key(unit: Unit, target: Target) -> String {
    unit.key(&options(target).each_ref().map(String::as_str))
}

/// The file of a unit compiled by a version of the compiler.
fn name(unit: Unit, target: Target, key: &str, (major, minor): (i32, i32)) -> String {
    let file = unit.file().name.trim_end_matches(".cu");
    let kind = if matches!(target, Target::Machine(_)) { "cubin" } else { "ptx" };
    format!("{file}-{}-{target}-{key}-nvrtc{major}.{minor}.{kind}", unit.dtype())
}

/// The files that an architecture can run: its own first, then those of older ones of its generation, which the hardware
/// runs too, then PTX, the newest first; each by any version of the compiler.
fn any_name(unit: Unit, arch: u32) -> impl Iterator<Item = (Target, String)> {
    let has_type = move |arch: &u32| supported(unit.dtype(), *arch);
    let generation = (arch / 10 * 10..=arch).rev().filter(has_type).map(Target::Machine);
    let older = VIRTUAL.into_iter().filter(move |older| *older <= arch).filter(has_type).map(Target::Ptx);
    generation.chain(older).flat_map(move |target| {
        let versions = [12, 13].into_iter().flat_map(|major| (0..=9).rev().map(move |minor| (major, minor)));
        let key = key(unit, target);
        versions.map(move |version| (target, name(unit, target, &key, version)))
    })
}

/// What it means that kernels for an architecture are PTX.
pub fn without_machine_code(arch: u32, target: Target) -> String {
    format!(
        "the kernels are PTX for {target}, which the driver compiles for sm_{arch} when they are first loaded: the NVRTC \
         that made them does not know sm_{arch}; a newer one makes its own code, perhaps faster"
    )
}

/// Why there is neither a compiler nor a compiled kernel, and what there is instead.
fn without_kernels(no_compiler: Error, arch: u32, cache: &Cache) -> Error {
    let Some(folder) = cache.seed() else { return no_compiler };
    let names = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.file_name());
    let found: BTreeSet<String> = names
        .filter_map(|name| {
            let (_, rest) = name.to_str()?.split_once("-sm_")?;
            Some(format!("sm_{}", rest.split('-').next()?))
        })
        .collect();
    let found = if found.is_empty() { "no kernels".to_owned() } else { Vec::from_iter(found).join(", ") };
    Error::Device(format!(
        "{} holds {found}, and none of this version for sm_{arch}: run `kernels build --arch sm_{arch}` of this very binary; \
         {no_compiler}",
        folder.display()
    ))
}

/// What stands before the image in a file, as JSON behind its own length.
#[derive(Serialize, Deserialize)]
struct Header {
    kernels: Vec<CompiledKernel>,
    /// SHA-256 of the image, in hexadecimal: the driver is told no length and trusts what it is given.
    sha256: String,
}

fn write(path: &Path, kernels: &[CompiledKernel], image: &[u8]) -> Result<()> {
    let header = Header { kernels: kernels.to_vec(), sha256: digest(image) };
    let header = serde_json::to_vec(&header).expect("plain data");
    let bytes = [&(header.len() as u64).to_le_bytes(), &*header, image].concat();
    std::fs::write(path, bytes).map_err(|e| Error::io(path, e))
}

fn read(path: &Path, target: Target, kept: bool) -> Result<Compiled> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let broken = || Error::file(path, "is no compiled kernel file, or a damaged one; delete it");
    let (len, rest) = bytes.split_first_chunk::<8>().ok_or_else(broken)?;
    let (header, image) =
        usize::try_from(u64::from_le_bytes(*len)).ok().and_then(|len| rest.split_at_checked(len)).ok_or_else(broken)?;
    let header: Header = serde_json::from_slice(header).map_err(|_| broken())?;
    if header.sha256 != digest(image) {
        return Err(broken());
    }
    Ok(Compiled { target, image: image.to_vec(), kernels: header.kernels, kept })
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Reads the assembler's report.
fn resources(names: &[(String, String)], log: &str) -> Vec<CompiledKernel> {
    let number_before = |line: &str, unit: &str| -> u32 {
        let at = line.find(unit).map_or("", |at| &line[..at]);
        at.trim_end().rsplit([' ', ',']).next().and_then(|n| n.parse().ok()).unwrap_or(0)
    };
    names
        .iter()
        .map(|(instance, symbol)| {
            let mut kernel = CompiledKernel {
                instance: instance.clone(),
                symbol: symbol.clone(),
                registers: 0,
                stack: 0,
                spills: 0,
                shared: 0,
            };
            let entry = format!("'{symbol}'");
            let lines = log.lines().skip_while(|line| !(line.contains("Compiling entry") && line.contains(&entry)));
            for line in lines.skip(1).take_while(|line| !line.contains("Compiling entry")) {
                if line.contains("bytes stack frame") {
                    kernel.stack = number_before(line, "bytes stack frame");
                    kernel.spills =
                        number_before(line, "bytes spill stores") + number_before(line, "bytes spill loads");
                } else if line.contains("registers") {
                    kernel.registers = number_before(line, "registers");
                    kernel.shared = number_before(line, "bytes smem");
                }
            }
            kernel
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_told_from_a_whole_one() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("kernel");
        write(&path, &[], b"an image").unwrap();
        let read = |path| read(path, Target::Machine(80), true);
        assert_eq!(read(&path).unwrap().image, b"an image");
        let whole = std::fs::read(&path).unwrap();
        for cut in [0, 7, 12, whole.len() - 1] {
            std::fs::write(&path, &whole[..cut]).unwrap();
            assert!(matches!(read(&path), Err(Error::File { .. })), "cut to {cut} bytes");
        }
    }

    #[test]
    fn a_generation_runs_what_was_made_for_its_older_members() {
        let unit = |dtype| Unit::all().unwrap().into_iter().find(|unit| unit.dtype() == dtype).unwrap();
        let of = |dtype, arch| -> Vec<String> {
            let names = any_name(unit(dtype), arch).map(|(target, name)| {
                let written = name.split('-').nth(2).unwrap().to_owned();
                assert_eq!(written, target.to_string());
                assert_eq!(name.ends_with(".ptx"), written.starts_with("compute_"));
                written
            });
            names.collect::<Vec<_>>().chunk_by(|a, b| a == b).map(|same| same[0].clone()).collect()
        };
        assert_eq!(of(Dtype::F16, 75), ["sm_75", "sm_74", "sm_73", "sm_72", "sm_71", "sm_70", "compute_75"]);
        assert_eq!(
            of(Dtype::Bf16, 90),
            ["sm_90", "compute_90", "compute_89", "compute_87", "compute_86", "compute_80"]
        );
        assert_eq!(of(Dtype::F32, 86)[..2], ["sm_86", "sm_85"]);
        assert_eq!(of(Dtype::F32, 150)[1], "compute_121");
    }

    #[test]
    fn a_folder_of_other_kernels_is_named_with_what_it_holds() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["dense-f32-sm_70-1-nvrtc12.9.cubin", "pool-f16-sm_90-2-nvrtc12.9.cubin", "notes.txt"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let cache = Cache::at("empty").with_seed(folder.path());
        let error = without_kernels(Error::Device("NVRTC was not found".into()), 80, &cache).to_string();
        assert!(
            ["sm_70, sm_90", "kernels build --arch sm_80", "NVRTC"].iter().all(|part| error.contains(part)),
            "{error}"
        );
    }
}
