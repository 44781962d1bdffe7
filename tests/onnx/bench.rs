//! `bench network --peers` beside the real ONNX Runtime.

use assert_cmd::Command;
use libtest_mimic::Failed;
use serde_json::Value;

use crate::oracle::VARIABLE;

/// ONNX Runtime takes the exported files, and has a row with a rate and its version for each.
pub fn beside_onnx_runtime() -> Result<(), Failed> {
    let python = std::env::var_os(VARIABLE).ok_or(VARIABLE)?;
    let version = Command::new(&python).args(["-c", "import onnxruntime; print(onnxruntime.__version__)"]).output()?;
    let version = String::from_utf8(version.stdout)?;
    let mut command = Command::cargo_bin("depthshrinker")?;
    let network = ["mobilenetv2-0.25", "--image", "32", "24", "--input-stride", "1", "--batch", "2", "--seconds", "0"];
    command.args(["bench", "network"]).args(network).args(["--json", "--peers", "--python"]).arg(python);
    let output = command.assert().success().get_output().stdout.clone();
    let records: Vec<Value> = serde_json::from_slice(&output)?;
    let mut networks = Vec::new();
    for record in records.iter().filter(|record| record.get("runtimes").is_some()) {
        let runtimes = record["runtimes"].as_array().ok_or("a list")?;
        let row = runtimes.iter().find(|row| row["runtime"] == "onnxruntime").ok_or("no row of ONNX Runtime")?;
        assert!(row["peer_images_per_s"].as_f64().is_some_and(|rate| rate > 0.0 && rate.is_finite()), "{row}");
        assert!(row["turn_time_us"].as_f64().is_some_and(|time| time > 0.0), "{row}");
        assert_eq!((&row["version"], row.get("peer_error")), (&Value::from(version.trim()), None), "{row}");
        assert_eq!(row["peer_note"], "CPUExecutionProvider", "{row}");
        networks.push(record["name"].as_str().ok_or("a name")?);
    }
    assert_eq!(networks, ["fused", "merged"]);
    Ok(())
}
