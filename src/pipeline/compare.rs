//! `compare`: methods × budgets × seeds as a plain list of jobs. A job is a `shrink` in a folder of its own, which starts from
//! the model that all share; so any job can run in any process, at any time and on any machine, goes on where it was killed, and is
//! not done again. Whatever jobs are finished are put together. Where times are measured, the first job measures one latency
//! table for all.

use std::path::Path;

use super::folder::{Entry, RunFolder, settings_fingerprint};
use super::latency::{PRUNED_TABLE, TABLE, measured};
use super::shrink::{LAST, Stance, shrink_in};
use crate::config::{CompareConfig, Config};
use crate::io::checkpoint::file_fingerprint;
use crate::io::{read_model, write_first};
use crate::measure::LatencySource;
use crate::report::{MetricsLine, RunResult, Trial, TrialName};
use crate::shrink::{LayerMethod, SearchMethod};
use crate::train::Reporter;
use crate::{Error, Result, files};

/// One job.
#[derive(Debug, Clone, PartialEq)]
pub struct Job {
    /// What it is of.
    pub name: TrialName,
    /// The settings of its `shrink`.
    pub config: Config,
    folder: RunFolder,
}

/// The jobs of a comparison, in an order that follows from the settings alone.
#[derive(Debug, Clone, PartialEq)]
pub struct Jobs {
    jobs: Vec<Job>,
    /// Content of the model that all start from.
    model: String,
    /// Steps of finetuning after which scores are taken.
    recovery_steps: Vec<u64>,
    /// Whether the tables that jobs read are measured here.
    measures: bool,
}

impl Jobs {
    /// The jobs of `config.compare`, with a folder each below `dir`. Everything else is the same for all of them.
    ///
    /// # Errors
    /// No model to start from, one that cannot be read, budgets that are no times where they are to be matched by the clock, or a
    /// method that trains no weights where finetuning is to begin with such.
    pub fn new(config: &Config, dir: &Path) -> Result<Self> {
        let model = config.model.as_deref().ok_or_else(|| {
            Error::Config("compare needs a trained model that all jobs start from; give its file".into())
        })?;
        let CompareConfig { methods, budgets, seeds, random_masks, selections, recovery_steps } = &config.compare;
        let counts = budgets.iter().find(|budget| config.search.match_latency.is_some() && !budget.is_time());
        if let Some(count) = counts {
            return Err(Error::Config(format!(
                "--match-latency needs budgets that are times, not {count}; give --latency-fractions"
            )));
        }
        // With a table each, one random mask would be another in every job.
        let of_layers = methods.iter().find(|method| method.layers().is_some());
        if let (Some(method), Some(count)) = (of_layers, budgets.iter().find(|budget| !budget.is_time())) {
            return Err(Error::Config(format!("{method} needs budgets that are times, not {count}; leave one out")));
        }
        let measured = config.latency == LatencySource::Measured;
        // What was chosen is priced as it was when it was chosen.
        let tables = selections.as_deref().unwrap_or(dir);
        let mut jobs = Vec::new();
        for &budget in budgets {
            for &method in methods {
                let random = method == SearchMethod::Random;
                let masks: Vec<Option<u64>> = if random { (0..*random_masks).map(Some).collect() } else { vec![None] };
                for &mask in &masks {
                    for &seed in seeds {
                        let name = TrialName { method: method.to_string(), budget: budget.to_string(), seed, mask };
                        let mut config = Config { seed, budget, compare_random: 0, ..config.clone() };
                        config.compare = CompareConfig::default();
                        config.search.method = Some(method);
                        if measured {
                            config.latency = LatencySource::Table(tables.join(table_file(method)));
                        }
                        config.search.plan =
                            selections.as_ref().map(|folder| folder.join(name.to_string()).join("plan.json"));
                        config.search.seed = mask.or(config.search.seed);
                        config.finetune.train.evaluate_after.clone_from(recovery_steps);
                        config.check_start()?;
                        let folder = RunFolder::new(dir.join(name.to_string()));
                        jobs.push(Job { name, config, folder });
                    }
                }
            }
        }
        let (recovery_steps, measures) = (recovery_steps.clone(), measured && selections.is_none());
        Ok(Self { jobs, model: file_fingerprint(model)?, recovery_steps, measures })
    }

    /// The jobs in order.
    pub fn jobs(&self) -> &[Job] {
        &self.jobs
    }

    /// Steps of finetuning after which scores are taken, beside its epochs.
    pub fn recovery_steps(&self) -> &[u64] {
        &self.recovery_steps
    }

    /// Runs a job, or goes on with it; one that is finished is only read.
    ///
    /// # Errors
    /// No such job, a finished one of other settings, or as [`shrink_in`].
    pub fn run(&self, index: usize, stance: Stance) -> Result<RunResult> {
        let job = self.jobs.get(index).ok_or_else(|| {
            let last = self.jobs.len().saturating_sub(1);
            Error::Config(format!("there is no job {index}; give 0 to {last}"))
        })?;
        if let Some(result) = self.result(job)? {
            return Ok(result);
        }
        self.measure_table(&job.config, stance)?;
        let entry = if job.folder.has_run() { Entry::Resume } else { Entry::New };
        shrink_in(&job.folder, &job.config, entry, stance)
    }

    /// Measures the table that all jobs read, where there is none yet. Of several processes that measure at once the first one's is
    /// taken.
    fn measure_table(&self, config: &Config, stance: Stance) -> Result<()> {
        let (Some(path), Some(model)) = (config.latency.file(), config.model.as_deref()) else { return Ok(()) };
        if !self.measures || path.is_file() {
            return Ok(());
        }
        let model = read_model(model)?.0;
        let mut reporter = if stance.quiet { Reporter::quiet() } else { Reporter::new() };
        let keys = table_file(config.method()) == PRUNED_TABLE;
        let table = measured(config, (&model, keys), &config.device()?, &mut reporter, path)?;
        let dir = path.parent().unwrap_or(Path::new("."));
        std::fs::create_dir_all(dir).map_err(|e| Error::io(dir, e))?;
        write_first(path, |out| out.write_all(table.to_csv().as_bytes()))
    }

    /// What the finished jobs found.
    ///
    /// # Errors
    /// A result that cannot be read or is of other settings.
    pub fn finished(&self) -> Result<Vec<Trial>> {
        let mut trials = Vec::new();
        for (index, job) in self.jobs.iter().enumerate() {
            let Some(result) = self.result(job)? else { continue };
            let metrics = MetricsLine::read_all(&files::read_text(&job.folder.path("metrics.jsonl"))?);
            trials.push(Trial::new(index, job.name.clone(), &result, &metrics));
        }
        Ok(trials)
    }

    /// The result of a job; `None` while it is not finished.
    fn result(&self, job: &Job) -> Result<Option<RunResult>> {
        if !job.is_finished() {
            return Ok(None);
        }
        let settings = settings_fingerprint("shrink", &job.config, std::slice::from_ref(&self.model), None)?;
        if !job.folder.has_settings(&settings)? {
            return Err(Error::Config(format!(
                "{} is of other settings or of another model; give another --out, or remove it",
                job.folder.dir().display()
            )));
        }
        let path = job.folder.path(LAST);
        serde_json::from_str(&files::read_text(&path)?)
            .map(Some)
            .map_err(|e| Error::file(&path, format!("is no result of a run ({e}); remove its folder")))
    }
}

/// The table that a method reads: LayerMerge one of its own.
fn table_file(method: SearchMethod) -> &'static str {
    if method.layers() == Some(LayerMethod::LayerMerge) { PRUNED_TABLE } else { TABLE }
}

impl Job {
    /// Whether its result is there.
    pub fn is_finished(&self) -> bool {
        self.folder.has(LAST)
    }

    /// Where it runs.
    pub fn folder(&self) -> &RunFolder {
        &self.folder
    }
}
