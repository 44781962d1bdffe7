//! NVRTC, the run-time compiler for CUDA C++, found and loaded at run time.
//!
//! Only the functions that making kernels takes. The crate `cudarc` binds them too, but for one major version at a
//! time and panicking without it, while both 12 (the last for sm_70) and 13 serve here.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use libloading::{Library, Symbol};

use super::cuda::Cuda;
use super::source::{Unit, files};
use crate::{Error, Result};

/// Installation advice for error messages.
const HOW_TO_GET: &str = "install it (pip install nvidia-cuda-nvrtc-cu12) and set DEPTHSHRINKER_NVRTC to its libnvrtc.so.12, \
                          or bring cubins made by `depthshrinker kernels build` in DEPTHSHRINKER_KERNELS";

/// A loaded compiler.
#[derive(Debug)]
pub struct Nvrtc {
    library: Library,
    version: (i32, i32),
}

/// What kernels are compiled to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// Machine code of an architecture, `sm_…`.
    Machine(u32),
    /// PTX of a virtual architecture, `compute_…`, from which the driver makes machine code of a newer one when it loads it.
    Ptx(u32),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Machine(arch) => write!(f, "sm_{arch}"),
            Self::Ptx(arch) => write!(f, "compute_{arch}"),
        }
    }
}

/// A compiled unit.
#[derive(Debug)]
pub struct Code {
    /// The cubin, or the text of the PTX with the zero byte at its end.
    pub image: Vec<u8>,
    /// Lowered name of every instance.
    pub names: Vec<(String, String)>,
    /// What the assembler said of each kernel.
    pub log: String,
}

type Program = *mut c_void;

impl Nvrtc {
    /// The library, looked for once a process: `$DEPTHSHRINKER_NVRTC` and nowhere else where that is set; otherwise where
    /// the system looks, then in the usual folders of CUDA toolkits. Where there is a driver, one of a newer major version is
    /// passed by: the driver may refuse what it makes.
    ///
    /// # Errors
    /// When there is none; says how to get it.
    pub fn find() -> Result<&'static Self> {
        static FOUND: OnceLock<std::result::Result<Nvrtc, String>> = OnceLock::new();
        FOUND
            .get_or_init(|| Self::look().map_err(|e| e.to_string().trim_start_matches("device: ").to_owned()))
            .as_ref()
            .map_err(|text| Error::Device(text.clone()))
    }

    fn look() -> Result<Self> {
        let set = std::env::var_os("DEPTHSHRINKER_NVRTC").filter(|v| !v.is_empty()).map(PathBuf::from);
        let newest = if set.is_some() { None } else { Cuda::driver_version().ok().map(|(major, _)| major) };
        let candidates = set.map_or_else(candidates, |path| vec![path]);
        let mut newer = String::new();
        for path in &candidates {
            // SAFETY: NVRTC's initialisers have no requirements.
            let Ok(library) = (unsafe { Library::new(path) }) else { continue };
            let mut nvrtc = Self { library, version: (0, 0) };
            let (mut major, mut minor): (c_int, c_int) = (0, 0);
            // SAFETY: the signature is the documented one.
            let code = unsafe {
                let version: Symbol<'_, unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int> =
                    nvrtc.symbol(b"nvrtcVersion\0")?;
                version(&mut major, &mut minor)
            };
            if newest.is_some_and(|newest| major > newest) {
                newer = format!("; {} is of version {major}, newer than the driver's CUDA", path.display());
            } else if code == 0 {
                nvrtc.version = (major, minor);
                return Ok(nvrtc);
            }
        }
        let tried: Vec<String> = candidates.iter().map(|path| path.display().to_string()).collect();
        Err(Error::Device(format!(
            "NVRTC was not found or does not load (tried {}{newer}); {HOW_TO_GET}",
            tried.join(", ")
        )))
    }

    /// Major and minor version.
    pub fn version(&self) -> (i32, i32) {
        self.version
    }

    /// What kernels for an architecture are compiled to: its machine code, or where it is newer than this compiler the PTX of
    /// the newest that the compiler knows.
    ///
    /// # Errors
    /// When the library does not say what it knows.
    pub fn target(&self, arch: u32) -> Result<Target> {
        let known = self.architectures()?;
        let older = known.iter().copied().filter(|&known| known < arch).max();
        Ok(match older {
            Some(newest) if !known.contains(&arch) => Target::Ptx(newest),
            _ => Target::Machine(arch),
        })
    }

    /// Compute capabilities, times ten, that it compiles for.
    fn architectures(&self) -> Result<Vec<u32>> {
        // SAFETY: the signatures are the documented ones; the array is as long as was asked for.
        let found = unsafe {
            let count: Symbol<'_, unsafe extern "C" fn(*mut c_int) -> c_int> =
                self.symbol(b"nvrtcGetNumSupportedArchs\0")?;
            let all: Symbol<'_, unsafe extern "C" fn(*mut c_int) -> c_int> =
                self.symbol(b"nvrtcGetSupportedArchs\0")?;
            let mut len: c_int = 0;
            self.check(count(&mut len), "nvrtcGetNumSupportedArchs")?;
            let mut found = vec![c_int::default(); usize::try_from(len).unwrap_or(0)];
            self.check(all(found.as_mut_ptr()), "nvrtcGetSupportedArchs")?;
            found
        };
        Ok(found.into_iter().filter_map(|arch| u32::try_from(arch).ok()).collect())
    }

    /// # Safety
    /// `T` is the symbol's type.
    unsafe fn symbol<T>(&self, name: &[u8]) -> Result<Symbol<'_, T>> {
        // SAFETY: promised by the caller.
        unsafe { self.library.get(name) }.map_err(|e| {
            Error::Device(format!("NVRTC has no {}: {e}", String::from_utf8_lossy(&name[..name.len() - 1])))
        })
    }

    /// Compiles a unit.
    ///
    /// # Errors
    /// What the compiler says, or an architecture that it does not know.
    pub fn compile(&self, unit: Unit, target: Target) -> Result<Code> {
        let text = |s: &str| CString::new(s).expect("sources hold no zero byte");
        let source = text(&unit.file().text);
        let name = text(&unit.file().name);
        let headers = files()?.iter().filter(|f| f.name.ends_with(".cuh"));
        let headers: Vec<(CString, CString)> = headers.map(|f| (text(&f.text), text(&f.name))).collect();
        let header_texts: Vec<*const c_char> = headers.iter().map(|h| h.0.as_ptr()).collect();
        let header_names: Vec<*const c_char> = headers.iter().map(|h| h.1.as_ptr()).collect();
        let mut program: Program = std::ptr::null_mut();
        // SAFETY: the signatures are the documented ones; all pointers live until the calls return, and sizes are asked
        // for before buffers are filled.
        unsafe {
            let create: Symbol<
                '_,
                unsafe extern "C" fn(
                    *mut Program,
                    *const c_char,
                    *const c_char,
                    c_int,
                    *const *const c_char,
                    *const *const c_char,
                ) -> c_int,
            > = self.symbol(b"nvrtcCreateProgram\0")?;
            let code = create(
                &mut program,
                source.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                header_texts.as_ptr(),
                header_names.as_ptr(),
            );
            self.check(code, "nvrtcCreateProgram")?;
            let result = self.compile_program(program, unit, target);
            let destroy: Symbol<'_, unsafe extern "C" fn(*mut Program) -> c_int> =
                self.symbol(b"nvrtcDestroyProgram\0")?;
            destroy(&mut program);
            result
        }
    }

    /// # Safety
    /// `program` is a program of this library.
    unsafe fn compile_program(&self, program: Program, unit: Unit, target: Target) -> Result<Code> {
        // SAFETY: as in `compile`.
        unsafe {
            let add: Symbol<'_, unsafe extern "C" fn(Program, *const c_char) -> c_int> =
                self.symbol(b"nvrtcAddNameExpression\0")?;
            let instances: Vec<CString> =
                unit.instances().map(|i| CString::new(i).expect("instances hold no zero byte")).collect();
            for instance in &instances {
                self.check(add(program, instance.as_ptr()), "nvrtcAddNameExpression")?;
            }
            let options = options(target).map(|o| CString::new(o).expect("options hold no zero byte"));
            let pointers: Vec<*const c_char> = options.iter().map(|o| o.as_ptr()).collect();
            let compile: Symbol<'_, unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int> =
                self.symbol(b"nvrtcCompileProgram\0")?;
            let code = compile(program, pointers.len() as c_int, pointers.as_ptr());
            let log = self.bytes(program, b"nvrtcGetProgramLogSize\0", b"nvrtcGetProgramLog\0")?;
            let log = String::from_utf8_lossy(&log).trim_end_matches('\0').to_owned();
            if code != 0 {
                let (major, minor) = self.version;
                let first =
                    log.lines().find(|line| line.contains("error")).unwrap_or("the architecture is unknown to it");
                return Err(Error::Device(format!(
                    "NVRTC {major}.{minor} cannot compile {unit} for {target}: {first}{}",
                    if matches!(target, Target::Machine(..75)) && major > 12 { " (sm_70 needs NVRTC 12)" } else { "" }
                )));
            }
            let image = match target {
                Target::Machine(_) => self.bytes(program, b"nvrtcGetCUBINSize\0", b"nvrtcGetCUBIN\0")?,
                Target::Ptx(_) => self.bytes(program, b"nvrtcGetPTXSize\0", b"nvrtcGetPTX\0")?,
            };
            let lowered: Symbol<'_, unsafe extern "C" fn(Program, *const c_char, *mut *const c_char) -> c_int> =
                self.symbol(b"nvrtcGetLoweredName\0")?;
            let mut names = Vec::with_capacity(instances.len());
            for instance in &instances {
                let mut name: *const c_char = std::ptr::null();
                self.check(lowered(program, instance.as_ptr(), &mut name), "nvrtcGetLoweredName")?;
                let name = CStr::from_ptr(name).to_string_lossy().into_owned();
                names.push((instance.to_string_lossy().into_owned(), name));
            }
            Ok(Code { image, names, log })
        }
    }

    /// # Safety
    /// The two functions have the signatures of `nvrtcGet…Size` and `nvrtcGet…`.
    unsafe fn bytes(&self, program: Program, size: &[u8], get: &[u8]) -> Result<Vec<u8>> {
        // SAFETY: promised by the caller; the buffer has the size that was asked for.
        unsafe {
            let mut len = 0usize;
            let size_of: Symbol<'_, unsafe extern "C" fn(Program, *mut usize) -> c_int> = self.symbol(size)?;
            self.check(size_of(program, &mut len), "nvrtcGet…Size")?;
            let mut out = vec![0u8; len];
            let get: Symbol<'_, unsafe extern "C" fn(Program, *mut c_char) -> c_int> = self.symbol(get)?;
            self.check(get(program, out.as_mut_ptr().cast()), "nvrtcGet…")?;
            Ok(out)
        }
    }

    fn check(&self, code: c_int, call: &str) -> Result<()> {
        if code == 0 { Ok(()) } else { Err(Error::Device(format!("{call} failed with code {code}"))) }
    }
}

/// Names that the system's loader may know, then files in toolkits: the oldest version first, since it knows the oldest
/// GPUs and serves the newest as well.
fn candidates() -> Vec<PathBuf> {
    let set = ["CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(std::env::var_os).map(PathBuf::from);
    let below = |folder: &str, prefix: &str| -> Vec<PathBuf> { entries(Path::new(folder), prefix) };
    let toolkits = set.chain(below("/usr/local", "cuda")).chain(below("/opt", "cuda"));
    let folders = toolkits.flat_map(|toolkit| {
        ["lib64", "lib", "targets/x86_64-linux/lib", "targets/sbsa-linux/lib"].map(|lib| toolkit.join(lib))
    });
    let mut files: Vec<PathBuf> = folders.flat_map(|folder| entries(&folder, "libnvrtc.so")).collect();
    // `libnvrtc.so.12` before `libnvrtc.so.12.9.86` before `libnvrtc.so.13`; the bare name, of unknown version, last.
    files.sort_by_key(|path| {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        (name == "libnvrtc.so", name)
    });
    let system = ["libnvrtc.so.12", "libnvrtc.so.13", "libnvrtc.so"].map(PathBuf::from);
    system.into_iter().chain(files).collect()
}

/// What lies in a folder under names with a prefix, in order of their names.
fn entries(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let Ok(found) = std::fs::read_dir(folder) else { return Vec::new() };
    let fits = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(prefix));
    let mut paths: Vec<PathBuf> = found.flatten().map(|entry| entry.path()).filter(fits).collect();
    paths.sort();
    paths
}

/// Options of every compilation. Subnormal f32 numbers count as zero, as on the host. The assembler, where it runs, reports
/// registers and spills in the log.
pub(super) fn options(target: Target) -> [String; 4] {
    let fixed = ["--std=c++17", "--ftz=true", "--ptxas-options=-v"].map(String::from);
    let [std, ftz, report] = fixed;
    [format!("--gpu-architecture={target}"), std, ftz, report]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_libraries_by_their_prefix_in_order() {
        let folder = tempfile::tempdir().unwrap();
        for name in ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc-builtins.so.12.9", "libcudart.so.12"] {
            std::fs::write(folder.path().join(name), "").unwrap();
        }
        let found = entries(folder.path(), "libnvrtc.so");
        assert_eq!(found, ["libnvrtc.so.12", "libnvrtc.so.13"].map(|name| folder.path().join(name)));
        assert!(entries(Path::new("/no/such/folder"), "lib").is_empty());
        assert_eq!(candidates()[0], Path::new("libnvrtc.so.12"));
    }
}
