//! Parquet shards of pictures; needs `--features parquet`. The reader opens files, so the input is written to one.
#![no_main]

use std::cell::OnceCell;
use std::fs;

use depthshrinker::data::{DataSource, Loader, open};
use libfuzzer_sys::fuzz_target;
use tempfile::TempDir;

thread_local! {
    static FOLDER: OnceCell<TempDir> = const { OnceCell::new() };
}

fuzz_target!(|bytes: &[u8]| {
    FOLDER.with(|folder| {
        let folder = folder.get_or_init(|| tempfile::tempdir().expect("a temporary folder")).path();
        for name in ["train-0.parquet", "validation-0.parquet"] {
            fs::write(folder.join(name), bytes).expect("a writable folder");
        }
        let name = format!("parquet:{}", folder.display());
        let Ok(data) = open(&DataSource { name, dir: None, image_size: Some(16) }) else { return };
        let Ok(loader) = Loader::eval(data.test.into(), 8) else { return };
        // Batches are made on another thread, which ends with them.
        let _ = loader.epoch(0, 0).take(2).collect::<Result<Vec<_>, _>>();
    });
});
