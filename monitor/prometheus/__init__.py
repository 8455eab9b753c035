"""What Prometheus and Grafana are given: alerts, the operator's objects, the dashboard."""
