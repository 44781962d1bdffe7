//! Description of the host: processor, features, caches, memory. Unknown values stay empty and are never guessed.

use serde::Serialize;

/// The host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Machine {
    /// The processor's name as the system reports it.
    pub cpu: String,
    /// Instruction set, such as `x86_64`.
    pub architecture: &'static str,
    /// Vector features the arithmetic can use.
    pub features: Vec<&'static str>,
    /// Cores this process may run on, hardware threads counted each.
    pub cores: usize,
    /// Threads of the current pool.
    pub threads: usize,
    /// Memory in bytes, where the system tells.
    pub memory_bytes: Option<u64>,
    /// Caches of the first core, nearest first.
    pub caches: Vec<CacheLevel>,
}

/// One cache.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CacheLevel {
    /// Level, 1 the nearest.
    pub level: u32,
    /// `Data`, `Instruction` or `Unified`.
    pub kind: String,
    /// Size in bytes.
    pub bytes: usize,
}

impl Machine {
    /// The machine this runs on.
    pub fn here() -> Self {
        let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
        let cpu = field(&read("/proc/cpuinfo"), "model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned());
        let memory = field(&read("/proc/meminfo"), "MemTotal");
        let kib = memory.and_then(|m| m.trim_end_matches("kB").trim().parse::<u64>().ok());
        Self {
            cpu,
            architecture: std::env::consts::ARCH,
            features: features(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            threads: rayon::current_num_threads(),
            memory_bytes: kib.map(|k| k << 10),
            caches: caches(),
        }
    }

    /// Size of the largest cache; 0 where none is known.
    pub fn largest_cache_bytes(&self) -> usize {
        self.caches.iter().map(|c| c.bytes).max().unwrap_or(0)
    }

    /// Size of the largest cache that a core has to itself, as far as levels tell: that of level 2; 0 where none is known.
    pub fn core_cache_bytes(&self) -> usize {
        self.caches.iter().filter(|c| c.level <= 2 && c.kind != "Instruction").map(|c| c.bytes).max().unwrap_or(0)
    }
}

/// The value of the first `key : value` line.
fn field(text: &str, key: &str) -> Option<String> {
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    lines.into_iter().find(|(k, _)| k.trim() == key).map(|(_, value)| value.trim().to_owned())
}

#[cfg(target_arch = "x86_64")]
fn features() -> Vec<&'static str> {
    let all = [
        ("sse4.1", is_x86_feature_detected!("sse4.1")),
        ("avx", is_x86_feature_detected!("avx")),
        ("avx2", is_x86_feature_detected!("avx2")),
        ("fma", is_x86_feature_detected!("fma")),
        ("f16c", is_x86_feature_detected!("f16c")),
        ("avx512f", is_x86_feature_detected!("avx512f")),
        ("avx512bw", is_x86_feature_detected!("avx512bw")),
        ("avx512vl", is_x86_feature_detected!("avx512vl")),
        ("avx512vnni", is_x86_feature_detected!("avx512vnni")),
    ];
    all.into_iter().filter_map(|(name, there)| there.then_some(name)).collect()
}

#[cfg(target_arch = "aarch64")]
fn features() -> Vec<&'static str> {
    // Every 64-bit Arm processor has it.
    vec!["neon"]
}

#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
fn features() -> Vec<&'static str> {
    Vec::new()
}

/// The caches Linux reports for the first core.
fn caches() -> Vec<CacheLevel> {
    (0..8)
        .filter_map(|index| {
            let read = |file: &str| {
                let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{file}");
                Some(std::fs::read_to_string(path).ok()?.trim().to_owned())
            };
            Some(CacheLevel { level: read("level")?.parse().ok()?, kind: read("type")?, bytes: size(&read("size")?)? })
        })
        .collect()
}

/// Bytes of a size such as `32K`.
fn size(text: &str) -> Option<usize> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let scale = match unit {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_linux_writes() {
        assert_eq!(field("a : 1\nmodel name\t: Some CPU: fast\n", "model name").unwrap(), "Some CPU: fast");
        assert_eq!(field("x", "model name"), None);
        assert_eq!((size("32K"), size("36M"), size("7"), size("big")), (Some(32 << 10), Some(36 << 20), Some(7), None));
    }
}
