//! Opens the configured store engine.

use std::sync::Arc;

use streamer_config::{Config, StoreEngine};
use streamer_store::Store;
use streamer_store_dynamodb::DynamoStore;
use streamer_telemetry::Metrics;

use crate::server::{
    error::StartError, measured_store::MeasuredStore, service_options::dynamo_options,
};

/// Opens the store. Returns the store and the maximum size of a value, if the engine limits it.
pub(crate) async fn open(
    config: &Config,
    metrics: &Metrics,
) -> Result<(Arc<dyn Store>, Option<usize>), StartError> {
    let (store, max_value_bytes): (Arc<dyn Store>, _) = match config.store.engine {
        StoreEngine::Sqlite => {
            let store = streamer_store_sqlite::open(&config.server.data_dir);
            (store.map_err(StartError::Store)?, None)
        }
        StoreEngine::Dynamodb => {
            let options = dynamo_options(config);
            let store =
                DynamoStore::open(&options, metrics).await.map_err(StartError::OpenDynamo)?;
            let max_value_bytes = store.max_value_bytes();
            (Arc::new(store), max_value_bytes)
        }
    };
    Ok((Arc::new(MeasuredStore::new(store, metrics)), max_value_bytes))
}
