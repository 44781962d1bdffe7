//! `check`: the operation table on the user's own device, against the host.

use anyhow::Result;
use serde_json::json;

use super::{Common, print};
use crate::Error;
use crate::check::{Case, Row, cases, compare_all};
use crate::device::Device;
use crate::device::cache::Cache;
use crate::device::counters::CounterLog;
use crate::device::emulator::{Emulator, EmulatorOptions};
use crate::device::gpu::Gpu;
use crate::dtype::Dtype;
use crate::report::case_table;

/// Options of `check`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Only cases whose name contains one of these
    #[arg(value_name = "NAME")]
    filters: Vec<String>,
    /// Print the names of the cases and run none
    #[arg(long)]
    list: bool,
    /// Count what the launches of each case do: sectors, bank conflicts, barriers, tensor-core operations. Needs --device
    /// emulator
    #[arg(long)]
    counters: bool,
}

/// Runs the table and prints what differs. In every precision that the device has, where none is given.
///
/// # Errors
/// A device that is not there or is no GPU, and any case that differs.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let wanted = |case: &Case| args.filters.is_empty() || args.filters.iter().any(|filter| case.name.contains(filter));
    if args.list {
        let names: Vec<String> = cases().into_iter().filter(wanted).map(|case| case.name).collect();
        let text = if common.json { format!("{:#}\n", json!(names)) } else { names.join("\n") + "\n" };
        return print("the names of the cases", &text);
    }
    let name = common.device.as_deref().unwrap_or("auto");
    let given: Option<Dtype> = common.precision.as_deref().map(str::parse).transpose()?;
    let precisions = given.map_or_else(|| Dtype::ALL.to_vec(), |precision| vec![precision]);
    let mut rows: Vec<Row> = Vec::new();
    let log = args.counters.then(CounterLog::default);
    let mut device = match &log {
        Some(log) => counting(name, precisions[0], log.clone())?,
        None => Device::open(name, if name == "cpu" || name == "auto" { Dtype::F32 } else { precisions[0] })?,
    };
    let Device::Gpu(gpu, _) = &device else {
        return Err(
            Error::Device("the host is what devices are compared with; use --device cuda or emulator".into()).into()
        );
    };
    let gpu = gpu.clone();
    // So that a failure names its kernel.
    gpu.set_blocking(true);
    let lacks = |precision: Dtype| precision == Dtype::Bf16 && gpu.driver().arch() < 80;
    for precision in precisions {
        if lacks(precision) && given.is_none() {
            continue;
        }
        match Device::on(gpu.clone(), precision) {
            Ok(opened) => {
                device = opened;
                rows.extend(compare_all(&device, wanted, log.as_ref()));
            }
            // What came of the cases before the one that lost it is told all the same.
            Err(error @ Error::DeviceLost(_)) if !rows.is_empty() => {
                rows.push(Row { precision, name: "open".into(), difference: Some(error.to_string()), counters: None });
            }
            Err(error) => return Err(error.into()),
        }
    }
    if rows.is_empty() {
        let names = args.filters.join(" or ");
        return Err(Error::Config(format!("no case has {names} in its name; --json without names lists them")).into());
    }
    let failed = rows.iter().filter(|row| row.difference.is_some()).count();
    let text = if common.json {
        let value = json!({ "device": device.name(), "cases": rows.len(), "failed": failed, "results": rows });
        format!("{value:#}\n")
    } else {
        let table = if args.counters { format!("{}\n", case_table(&rows).text()) } else { String::new() };
        format!("{table}{}: {} cases, {failed} differ from the host\n", device.name(), rows.len())
    };
    print("the outcome", &text)?;
    match failed {
        0 => Ok(()),
        _ => Err(Error::Device(format!("{failed} of {} cases differ from the host", rows.len())).into()),
    }
}

/// The emulator, counting.
fn counting(name: &str, precision: Dtype, log: CounterLog) -> Result<Device> {
    if name != "emulator" {
        return Err(Error::Config("--counters are the emulator's; use --device emulator".into()).into());
    }
    let options = EmulatorOptions { counters: Some(log), ..EmulatorOptions::default() };
    Ok(Device::on(Gpu::new(Box::new(Emulator::new(options, Cache::of_user())?)), precision)?)
}
