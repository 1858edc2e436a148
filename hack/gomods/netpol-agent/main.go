// Command netpol-agent enforces NetworkPolicies on the one node of the self-built kind cluster, which
// has no network plugin that would. It runs in the node as a systemd service and renders all policies
// into one nftables table: every packet between pods of one node crosses the node's forward chain.
//
// For tests only. It reads the cluster with the node's admin kubeconfig, knows IPv4, and takes effect
// when the API server reports a pod's address, which is up to a second after the pod's first packet.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/clientcmd"
)

const (
	kubeconfig = "/etc/kubernetes/admin.conf"
	gather     = 20 * time.Millisecond // changes in this time make one ruleset
	retry      = time.Second
)

func main() {
	log.SetFlags(0)
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := run(ctx); err != nil {
		log.Fatal(err)
	}
}

func run(ctx context.Context) error {
	config, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return fmt.Errorf("%s: %w", kubeconfig, err)
	}
	client, err := kubernetes.NewForConfig(config)
	if err != nil {
		return err
	}
	factory := informers.NewSharedInformerFactory(client, 0)
	pods, namespaces := factory.Core().V1().Pods(), factory.Core().V1().Namespaces()
	policies := factory.Networking().V1().NetworkPolicies()
	changed := make(chan struct{}, 1)
	nudge := func() {
		select {
		case changed <- struct{}{}:
		default:
		}
	}
	handler := cache.ResourceEventHandlerFuncs{
		AddFunc:    func(any) { nudge() },
		UpdateFunc: func(any, any) { nudge() },
		DeleteFunc: func(any) { nudge() },
	}
	informed := []cache.SharedIndexInformer{pods.Informer(), namespaces.Informer(), policies.Informer()}
	for _, informer := range informed {
		if _, err := informer.AddEventHandler(handler); err != nil {
			return err
		}
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	nudge()

	applied := ""
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-changed:
		}
		time.Sleep(gather)
		var s snapshot
		if s.pods, err = pods.Lister().List(labels.Everything()); err != nil {
			return err
		}
		if s.namespaces, err = namespaces.Lister().List(labels.Everything()); err != nil {
			return err
		}
		if s.policies, err = policies.Lister().List(labels.Everything()); err != nil {
			return err
		}
		script := render(s)
		if script == applied {
			continue
		}
		if err := apply(script); err != nil {
			log.Printf("%v; trying again", err)
			time.AfterFunc(retry, nudge)
			continue
		}
		applied = script
	}
}

// apply loads the script in one transaction: the old rules hold until the new ones do.
func apply(script string) error {
	command := exec.Command("nft", "-f", "-")
	command.Stdin = strings.NewReader(script)
	if output, err := command.CombinedOutput(); err != nil {
		return fmt.Errorf("nft: %w: %s", err, output)
	}
	return nil
}
