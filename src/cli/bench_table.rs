//! `bench table`: networks side by side.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use serde_json::Value;

use super::settings::parse_seconds;
use super::{Common, print};
use crate::config::Config;
use crate::device::Device;
use crate::dtype::Dtype;
use crate::io::write_atomic;
use crate::measure::{ComparisonRecord, DATA_SHEETS, Findings, Form, LayerRecord, Limits, Projection};
use crate::pipeline::{Bench, Comparison, Contestant, Entry, published_networks};
use crate::report::{
    BENCH_SCHEMA, ComparisonFile, ComparisonPage, RooflinePlot, comparison_table, csv, headlines, json_text,
    published_table,
};
use crate::train::Reporter;
use crate::{Error, files};

/// The file that a run goes on from.
const JSON: &str = "table.json";
/// Share of the time for the layers of one network before and after, which the page draws under the roofline.
const LAYERS_SHARE: f64 = 0.08;
/// Sizes of a quick run: whether everything runs, not how fast.
const QUICK: Sizes = Sizes { image: 32, batch: 2, deployed: &[1], seconds: 0.0 };
/// Sizes of any other run: those of the paper, and those of deployment.
const FULL: Sizes = Sizes { image: 224, batch: 128, deployed: &[1, 32, 128], seconds: 600.0 };

#[derive(Debug, Clone, Copy)]
struct Sizes {
    image: u32,
    batch: u32,
    deployed: &'static [u32],
    seconds: f64,
}

/// Options of `bench table`.
#[derive(Debug, Clone, clap::Args)]
pub struct Args {
    /// Networks, each by name or as a model file; behind a colon what is merged: a published mask by name, a list of 0 and
    /// 1, or a plan.json
    #[arg(value_name = "NET[:SELECTION]", required_unless_present = "preset")]
    nets: Vec<Contestant>,
    /// A list of networks: published has those of DepthShrinker's table with their published figures, EC's masks and others
    #[arg(long, value_name = "LIST", value_parser = ["published"])]
    preset: Option<String>,
    /// Only these of the list, by the names in its table
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "preset")]
    only: Option<Vec<String>>,
    /// Height and width of the images in pixels [default: 224]
    #[arg(long, visible_alias = "images", value_name = "PIXELS", value_parser = clap::value_parser!(u32).range(1..=8192))]
    image: Option<u32>,
    /// Images per pass of the rows as published [default: 128]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    batch: Option<u32>,
    /// Images per pass of the deployed rows [default: 1,32,128]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=1 << 16))]
    deployed_batches: Option<Vec<u32>>,
    /// Seconds for all measurements together; slow work takes longer, and 0 times each piece of it once [default: 600]
    #[arg(long, value_parser = parse_seconds)]
    seconds: Option<f64>,
    /// Also project each row to a GPU by its data sheet, such as v100 or h100: what the counts of the steps would allow
    #[arg(long, value_name = "GPU")]
    project: Option<String>,
    /// Small images, single ones and no time: shows that everything runs
    #[arg(long)]
    quick: bool,
    /// Go on from the table.json in the folder: rows that it has times of are not timed again
    #[arg(long, requires = "out")]
    resume: bool,
}

/// What a run of the command is about.
struct Run<'a> {
    common: &'a Common,
    devices: Vec<(Device, Limits)>,
    projection: Option<Projection>,
    title: String,
}

/// Times, prints, and writes files if a folder is given.
///
/// # Errors
/// An unknown GPU to project to, a device that is not there, or a folder that cannot be written.
pub fn run(args: &Args, common: &Common) -> Result<()> {
    let sizes = if args.quick { QUICK } else { FULL };
    let projection = args.project.as_deref().map(projection).transpose()?;
    let contestants = args.contestants()?;
    let config = common.base_config(Entry::New, None)?;
    common.ready(&config)?;
    let budget = Duration::from_secs_f64(args.seconds.unwrap_or(sizes.seconds));
    let devices = devices(common, &config, budget)?;
    let deployed = args.deployed_batches.as_deref().unwrap_or(sizes.deployed);
    let deployed: Vec<usize> = deployed.iter().map(|&batch| batch as usize).collect();
    let comparison = Comparison {
        devices: &devices,
        image: args.image.unwrap_or(sizes.image) as usize,
        batch: args.batch.unwrap_or(sizes.batch) as usize,
        deployed_batches: &deployed,
        budget: budget.mul_f64(1.0 - LAYERS_SHARE),
        projection,
        config: &config,
    };
    let title = format!("networks side by side on {}, images of {} pixels", devices[0].0.name(), comparison.image);
    let run = Run { common, devices: devices.clone(), projection, title };
    let before = if args.resume { run.before()? } else { Vec::new() };
    let mut reporter = if common.quiet { Reporter::quiet() } else { Reporter::new() };
    let records = comparison.run(&contestants, &before, &mut reporter, &|rows| run.keep(rows, false))?;
    let rooflines = match fastest_merged(&contestants, &records) {
        Some(contestant) => run.rooflines(&comparison, contestant, budget.mul_f64(LAYERS_SHARE))?,
        None => Vec::new(),
    };
    run.finish(&records, &rooflines)
}

impl Args {
    /// Those that were named, then those of the list.
    fn contestants(&self) -> crate::Result<Vec<Contestant>> {
        let mut listed = if self.preset.is_some() { published_networks() } else { Vec::new() };
        if let Some(only) = &self.only {
            let names: Vec<String> = listed.iter().map(|contestant| contestant.name.clone()).collect();
            if let Some(unknown) = only.iter().find(|name| !names.contains(name)) {
                return Err(Error::Config(format!("--only {unknown:?}; the list has {}", names.join(", "))));
            }
            listed.retain(|contestant| only.contains(&contestant.name));
        }
        Ok(self.nets.iter().cloned().chain(listed).collect())
    }
}

pub(super) fn projection(name: &str) -> crate::Result<Projection> {
    Projection::named(name).ok_or_else(|| {
        let known: Vec<&str> = DATA_SHEETS.iter().map(|sheet| sheet.name).collect();
        Error::Config(format!("--project {name:?}; known are {}", known.join(", ")))
    })
}

/// The device in the precision that was asked for, else in `f32` and, on a GPU, in `f16`; each with its limits.
fn devices(common: &Common, config: &Config, budget: Duration) -> Result<Vec<(Device, Limits)>> {
    let first = config.device()?;
    let mut devices = vec![first.clone()];
    if let (Device::Gpu(gpu, _), None) = (&first, &common.precision) {
        devices.push(Device::on(gpu.clone(), Dtype::F16)?);
        if gpu.driver().is_emulated() {
            tracing::warn!("times of the emulator say nothing about any GPU");
        }
    }
    let with_limits = |device: Device| Ok((device.clone(), Limits::measure(&device, budget)?));
    devices.into_iter().map(with_limits).collect()
}

/// The network that merging made the fastest.
fn fastest_merged<'a>(contestants: &'a [Contestant], records: &[ComparisonRecord]) -> Option<&'a Contestant> {
    let merged = records.iter().filter(|r| r.work.selection.is_some() && r.work.form == Form::Deployed);
    let fastest = merged.max_by(|a, b| a.images_per_s().unwrap_or(0.0).total_cmp(&b.images_per_s().unwrap_or(0.0)))?;
    fastest.images_per_s()?;
    contestants.iter().find(|contestant| contestant.name == fastest.work.name)
}

impl Run<'_> {
    /// The rows that an earlier run has left in the folder.
    fn before(&self) -> crate::Result<Vec<ComparisonRecord>> {
        let Some(path) = self.path(JSON).filter(|path| path.exists()) else { return Ok(Vec::new()) };
        let unreadable = |problem: String| Error::Config(format!("{}: {problem}; leave --resume out", path.display()));
        let mut file: Value =
            serde_json::from_str(&files::read_text(&path)?).map_err(|error| unreadable(error.to_string()))?;
        match file["rows"].take() {
            Value::Array(rows) => Ok(rows.into_iter().filter_map(ComparisonRecord::timed_before).collect()),
            _ => Err(unreadable("it has no rows".into())),
        }
    }

    /// The layers of a network and of its merged form under the roofline of the first device.
    fn rooflines(
        &self,
        comparison: &Comparison<'_>,
        contestant: &Contestant,
        budget: Duration,
    ) -> Result<Vec<(String, String)>> {
        let (device, limits) = &self.devices[0];
        let batch = comparison.deployed_batches.iter().copied().max().unwrap_or(1);
        let pair = comparison.pair(contestant)?;
        let bench = Bench { device, limits, budget, peer: None };
        let found: Findings<LayerRecord> = pair.forward_layers(&bench, batch)?;
        let plot = |name: &str, caption: String| {
            let of_network = |record: &&LayerRecord| record.work.count.get(name).is_some_and(|&count| count > 0);
            let records: Vec<LayerRecord> = found.records.iter().filter(of_network).cloned().collect();
            let svg = RooflinePlot::of_layers(caption.clone(), &records, &limits.roofline).svg();
            (caption, svg)
        };
        let of = format!("batch {batch}, {}", device.precision());
        Ok(vec![
            plot("original", format!("{}, original: forward layers, {of}", pair.original.graph.name)),
            plot("merged", format!("{}, merged: forward layers, {of}", contestant.name)),
        ])
    }

    fn keep(&self, rows: &[ComparisonRecord], complete: bool) -> crate::Result<()> {
        let limits = |(device, limits): &(Device, Limits)| (device.precision().to_string(), limits.record());
        let file = ComparisonFile {
            schema: BENCH_SCHEMA,
            version: env!("CARGO_PKG_VERSION"),
            complete,
            projected_to: self.projected_to(),
            peaks: self.devices.iter().map(limits).collect(),
            rows,
        };
        self.write(JSON, &json_text(&file))
    }

    /// Prints the tables and writes `table.json`, `table.csv` and `table.html`.
    fn finish(&self, records: &[ComparisonRecord], rooflines: &[(String, String)]) -> Result<()> {
        self.keep(records, true)?;
        self.write("table.csv", &csv(records))?;
        let page = ComparisonPage { title: &self.title, records, rooflines, projected_to: self.projected_to() };
        self.write("table.html", &page.html())?;
        let text = match self.common.json {
            true => json_text(records),
            false => self.text(records),
        };
        print("the times", &text)
    }

    fn text(&self, records: &[ComparisonRecord]) -> String {
        let mut text = format!("{}\n\n{}", self.title, comparison_table(records).text());
        if let Some(device) = self.projected_to() {
            text.push_str(&format!("projected: images/s that the counts of the steps would allow on a {device}\n"));
        }
        if records.iter().any(|record| record.work.published.top1.is_some()) {
            let legend = "* published; here: timed as the paper did; ×: images/s over those of mobilenetv2-1.4";
            text.push_str(&format!("\n{}{legend}\n", published_table(records).text()));
        }
        for line in headlines(records) {
            text.push_str(&format!("{line}\n"));
        }
        text
    }

    fn projected_to(&self) -> Option<&'static str> {
        self.projection.map(|projection| projection.sheet.name)
    }

    fn path(&self, name: &str) -> Option<PathBuf> {
        self.common.out.as_deref().map(|folder: &Path| folder.join(name))
    }

    /// Writes a file as a whole, where a folder is given.
    fn write(&self, name: &str, text: &str) -> crate::Result<()> {
        let (Some(folder), Some(path)) = (&self.common.out, self.path(name)) else { return Ok(()) };
        fs::create_dir_all(folder).map_err(|e| Error::io(folder, e))?;
        write_atomic(&path, |out| out.write_all(text.as_bytes()))
    }
}
