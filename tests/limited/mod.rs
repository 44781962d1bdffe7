//! The program in little address space, where it must refuse what it is given.

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// What a file that was made to harm may cost, in KiB of address space: what a thread more would cost is left out.
const ADDRESS_SPACE_KB: u64 = 256 << 10;
/// Far above what any refusal takes, on a machine that does much else.
const LIMIT: Duration = Duration::from_secs(20);

/// Runs the program on one thread in `dir`. It must fail, by itself, with one short line that holds all of `words`.
pub fn refuses(dir: &Path, args: &[&str], words: &[&str]) -> Result<(), String> {
    let start = Instant::now();
    let output = Command::new("sh")
        .args(["-c", "ulimit -v $1; shift; exec \"$@\"", "sh", &ADDRESS_SPACE_KB.to_string()])
        .arg(env!("CARGO_BIN_EXE_depthshrinker"))
        .args(args)
        .args(["--threads", "1", "-q"])
        .current_dir(dir)
        .output()
        .map_err(|e| e.to_string())?;
    let told = String::from_utf8_lossy(&output.stderr);
    let is_line = told.starts_with("error: ") && told.lines().count() == 1 && told.len() < 2000;
    let is_meant = words.iter().all(|word| told.contains(word));
    if matches!(output.status.code(), Some(1 | 2)) && is_line && is_meant && start.elapsed() < LIMIT {
        return Ok(());
    }
    let told: String = told.chars().take(1000).collect();
    Err(format!("{args:?}: {} in {:?}, {words:?} expected: {told}", output.status, start.elapsed()))
}
