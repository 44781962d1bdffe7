//! Units to cubins: from the cache, else through NVRTC; and what the assembler says of each kernel.

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::cache::Cache;
use super::nvrtc::{Nvrtc, options};
use super::source::Unit;
use crate::dtype::Dtype;
use crate::{Error, Result};

/// Architectures that are compiled and checked for: V100, T4, A100, RTX 30, H100.
pub const ARCHITECTURES: [u32; 5] = [70, 75, 80, 86, 90];

/// A unit ready to be loaded.
#[derive(Debug, Clone)]
pub struct Compiled {
    /// The cubin.
    pub image: Vec<u8>,
    /// Its kernels.
    pub kernels: Vec<CompiledKernel>,
    /// Whether the cache keeps it.
    pub kept: bool,
}

/// One kernel of a cubin.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CompiledKernel {
    /// Its name expression.
    pub instance: String,
    /// Its name in the cubin.
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

/// Compiles a unit, or takes it from the cache. One that was brought along (`$DEPTHSHRINKER_KERNELS`) serves whatever
/// version of the compiler made it; without a compiler, so does any.
///
/// # Errors
/// When it is in no cache and there is no compiler, or the compiler refuses.
pub fn compile(unit: Unit, arch: u32, cache: &Cache) -> Result<Compiled> {
    require(unit.dtype(), arch)?;
    let options = options(arch);
    let key = unit.key(&options.each_ref().map(String::as_str));
    let stem = format!("{}-{}-sm_{arch}-{key}", unit.file().name.trim_end_matches(".cu"), unit.dtype());
    let name = |(major, minor): (i32, i32)| format!("{stem}-nvrtc{major}.{minor}.cubin");
    let versions = || [12, 13].into_iter().flat_map(|major| (0..=9).rev().map(move |minor| (major, minor)));
    if let Some(path) = versions().find_map(|version| cache.brought(&name(version))) {
        return read(&path, true);
    }
    let nvrtc = match Nvrtc::find() {
        Ok(nvrtc) => nvrtc,
        Err(error) => {
            let found = versions().find_map(|version| cache.find(&name(version)));
            return read(&found.ok_or(error)?, true);
        }
    };
    let entry = cache.entry(&name(nvrtc.version()), |path| {
        let cubin = nvrtc.compile(unit, arch)?;
        let kernels = resources(&cubin.names, &cubin.log);
        let header = serde_json::to_vec(&kernels).expect("plain data");
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend(cubin.image);
        std::fs::write(path, bytes).map_err(|e| Error::io(path, e))
    })?;
    read(entry.path(), entry.is_kept())
}

/// Compiles everything for an architecture and names the kernels that use local memory, which none should.
///
/// # Errors
/// As [`compile`].
pub fn spilling(arch: u32, cache: &Cache) -> Result<Vec<String>> {
    let units: Vec<Unit> = Unit::all().into_iter().filter(|unit| supported(unit.dtype(), arch)).collect();
    let compiled: Vec<Compiled> =
        units.into_par_iter().map(|unit| compile(unit, arch, cache)).collect::<Result<_>>()?;
    let spills = compiled.iter().flat_map(|c| &c.kernels).filter(|k| k.stack > 0 || k.spills > 0);
    Ok(spills
        .map(|k| format!("{} on sm_{arch}: {} bytes of stack, {} spilled", k.instance, k.stack, k.spills))
        .collect())
}

fn read(path: &std::path::Path, kept: bool) -> Result<Compiled> {
    let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
    let broken = || Error::file(path, "is no compiled kernel file; delete it");
    let (len, rest) = bytes.split_first_chunk::<8>().ok_or_else(broken)?;
    let (header, image) =
        usize::try_from(u64::from_le_bytes(*len)).ok().and_then(|len| rest.split_at_checked(len)).ok_or_else(broken)?;
    let kernels = serde_json::from_slice(header).map_err(|_| broken())?;
    Ok(Compiled { image: image.to_vec(), kernels, kept })
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
